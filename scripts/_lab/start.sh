#!/bin/busybox sh
# PID 1 of the lab behind the initramfs: runs /lab/command, its output through two virtio ports, its exit code through
# a third; a fourth is there for its interrupts only. Pipes stand before the ports because a port can be opened once
# only, while /dev/stdout shall be openable.
export PATH=/usr/sbin:/usr/bin
chmod 1777 /tmp /var/tmp
mount -t tmpfs tmpfs /run
mkdir -p /dev/shm /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t devpts devpts /dev/pts
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ln -s /proc/self/fd /dev/fd
ln -s /proc/self/fd/0 /dev/stdin
ln -s /proc/self/fd/1 /dev/stdout
ln -s /proc/self/fd/2 /dev/stderr
hostname lab
ip link set lo up

port() { echo "/dev/$(basename "$(dirname "$(grep -lx "$1" /sys/class/virtio-ports/*/name)")")"; }
cat "$(port pulse)" >/dev/null &
mkfifo /run/stdout /run/stderr
cat </run/stdout >"$(port stdout)" & out=$!
cat </run/stderr >"$(port stderr)" & err=$!
/lab/command </dev/null >/run/stdout 2>/run/stderr
code=$?
# Processes left behind may hold the pipes open: they get a second to finish.
{ sleep 1; kill $out $err; } 2>/dev/null &
wait $out $err
echo $code >"$(port exit-code)"
sleep 60
