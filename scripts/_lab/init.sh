#!/bin/busybox sh
# PID 1 of the lab's initramfs: drivers, then a root made of the system disk, the project disk over it, and memory
# over both for what gets written.
b=/bin/busybox
$b mount -t devtmpfs devtmpfs /dev
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
while read -r module; do $b insmod "/modules/$module"; done </modules/order
$b mount -o ro,noatime /dev/vda /system
$b mount -o ro,noatime /dev/vdb /project
$b mount -t tmpfs -o mode=755 upper /upper
$b mkdir /upper/files /upper/work
$b mount -t overlay -o lowerdir=/project:/system,upperdir=/upper/files,workdir=/upper/work root /root
for kind in dev proc sys; do $b mount --move /$kind /root/$kind; done
exec $b switch_root /root /lab/start
