"""The groups of what is no virtio device: serial ports, keyboard controller, vCPUs, and the VM itself.

Names are Firecracker's (its documentation of metrics).
"""

from __future__ import annotations

from asyncvmm.metrics.counters import LatencyAggregate, MetricGroup, counter, store, times


class UartMetrics(MetricGroup):
    """``uart``: both serial ports together."""

    error_count: int = counter("received bytes overrun")
    flush_count: int = counter("times output was taken from a port")
    missed_read_count: int = counter("reads of a receive buffer that was empty")
    missed_write_count: int = counter("bytes the guest wrote that were dropped")
    read_count: int = counter("bytes the guest read")
    write_count: int = counter("bytes the guest wrote")
    rate_limiter_dropped_bytes: int = counter("bytes dropped by a rate limiter")


class I8042Metrics(MetricGroup):
    """``i8042``: the keyboard controller's ports."""

    error_count: int = counter("resets that could not be carried out")
    missed_read_count: int = counter("reads of ports that do not exist")
    missed_write_count: int = counter("writes to ports that do not exist")
    read_count: int = counter("reads")
    reset_count: int = counter("resets the guest asked for")
    write_count: int = counter("writes")


class VcpuMetrics(MetricGroup):
    """``vcpu``: exits to userspace, all vCPUs together, and the time it took to answer them."""

    exit_io_in: int = counter("exits for port reads")
    exit_io_out: int = counter("exits for port writes")
    exit_mmio_read: int = counter("exits for memory-mapped reads")
    exit_mmio_write: int = counter("exits for memory-mapped writes")
    failures: int = counter("exits that no guest runs on after")
    kvmclock_ctrl_fails: int = counter("KVM_KVMCLOCK_CTRL calls that failed")
    exit_io_in_agg: LatencyAggregate = times("time of port reads")
    exit_io_out_agg: LatencyAggregate = times("time of port writes")
    exit_mmio_read_agg: LatencyAggregate = times("time of memory-mapped reads")
    exit_mmio_write_agg: LatencyAggregate = times("time of memory-mapped writes")


class LatenciesMetrics(MetricGroup):
    """``latencies_us``: microseconds the newest of each took; ``vmm_*`` the machine's share, the others the caller's
    whole wait."""

    full_create_snapshot: int = store("full snapshot")
    diff_create_snapshot: int = store("differential snapshot")
    load_snapshot: int = store("restore")
    pause_vm: int = store("pause")
    resume_vm: int = store("resume")
    vmm_full_create_snapshot: int = store("full snapshot, in the machine")
    vmm_diff_create_snapshot: int = store("differential snapshot, in the machine")
    vmm_load_snapshot: int = store("restore, in the machine")
    vmm_pause_vm: int = store("pause, in the machine")
    vmm_resume_vm: int = store("resume, in the machine")


class VmmMetrics(MetricGroup):
    """``vmm``."""

    panic_count: int = store("1 if the VM died of an error of ours")


class SignalMetrics(MetricGroup):
    """``signals``: signals that were handled. A signal is the whole process's: a VM counts those it took for itself."""

    sigbus: int = store("1 if SIGBUS was handled")
    sigsegv: int = store("1 if SIGSEGV was handled")
    sigxfsz: int = store("1 if SIGXFSZ was handled")
    sigxcpu: int = store("1 if SIGXCPU was handled")
    sigpipe: int = counter("SIGPIPEs handled")
    sighup: int = store("1 if SIGHUP was handled")
    sigill: int = store("1 if SIGILL was handled")
