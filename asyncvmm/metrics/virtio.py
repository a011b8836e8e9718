"""The groups of the virtio devices. Names are Firecracker's (its documentation of metrics), but for the console's.

``activate_fails``, ``cfg_fails`` and the like mean the same everywhere: the driver's DRIVER_OK could not be followed; a
read or write of the configuration space was outside it or not allowed.
"""

from __future__ import annotations

from asyncvmm.metrics.counters import LatencyAggregate, MetricGroup, counter, times

_ACTIVATE_FAILS = "activations that failed"
_CFG_FAILS = "accesses of the configuration space that failed"


class BalloonMetrics(MetricGroup):
    """``balloon``."""

    activate_fails: int = counter(_ACTIVATE_FAILS)
    inflate_count: int = counter("inflate requests handled")
    stats_updates_count: int = counter("statistics taken from the driver")
    stats_update_fails: int = counter("statistics that could not be taken")
    deflate_count: int = counter("deflate requests handled")
    event_fails: int = counter("queue notifications that failed")
    free_page_report_count: int = counter("free page reports handled")
    free_page_report_freed: int = counter("bytes given back by free page reports")
    free_page_report_fails: int = counter("ranges of free page reports not given back")
    free_page_hint_count: int = counter("free page hints handled")
    free_page_hint_freed: int = counter("bytes given back by free page hints")
    free_page_hint_fails: int = counter("ranges of free page hints not given back")


class BlockMetrics(MetricGroup):
    """``block`` (the sum) and ``block_<id>``."""

    activate_fails: int = counter(_ACTIVATE_FAILS)
    cfg_fails: int = counter(_CFG_FAILS)
    no_avail_buffer: int = counter("notifications that found no request")
    event_fails: int = counter("queue notifications that failed")
    execute_fails: int = counter("requests that failed while they were carried out")
    invalid_reqs_count: int = counter("requests refused as invalid")
    flush_count: int = counter("flushes done")
    queue_event_count: int = counter("queue notifications")
    rate_limiter_event_count: int = counter("wake-ups by the rate limiter")
    update_count: int = counter("changes of the image underneath")
    update_fails: int = counter("changes of the image underneath that failed")
    read_bytes: int = counter("bytes read")
    write_bytes: int = counter("bytes written")
    read_count: int = counter("reads done")
    write_count: int = counter("writes done")
    read_agg: LatencyAggregate = times("time of reads")
    write_agg: LatencyAggregate = times("time of writes")
    rate_limiter_throttled_events: int = counter("notifications the rate limiter held back")
    io_engine_throttled_events: int = counter("notifications held back because the I/O engine was full")
    remaining_reqs_count: int = counter("requests still in the queue when a notification had been handled")


class NetMetrics(MetricGroup):
    """``net`` (the sum) and ``net_<id>``. ``tap_*`` speak of whatever carries the frames, a user network as well."""

    activate_fails: int = counter(_ACTIVATE_FAILS)
    cfg_fails: int = counter(_CFG_FAILS)
    no_rx_avail_buffer: int = counter("frames that found no receive buffer")
    no_tx_avail_buffer: int = counter("transmit notifications that found no frame")
    event_fails: int = counter("queue notifications that failed")
    rx_queue_event_count: int = counter("receive queue notifications")
    rx_event_rate_limiter_count: int = counter("wake-ups by the receive rate limiter")
    rx_rate_limiter_throttled: int = counter("times the receive rate limiter held frames back")
    rx_tap_event_count: int = counter("times the host had frames to read")
    rx_bytes_count: int = counter("bytes received by the guest")
    rx_packets_count: int = counter("frames received by the guest")
    rx_fails: int = counter("failures to receive")
    rx_count: int = counter("receive operations done")
    tap_read_fails: int = counter("reads from the host's side that failed")
    tap_write_fails: int = counter("writes to the host's side that failed")
    tap_write_agg: LatencyAggregate = times("time of writes to the host's side")
    tx_bytes_count: int = counter("bytes sent by the guest")
    tx_malformed_frames: int = counter("frames refused as malformed")
    tx_fails: int = counter("failures to send")
    tx_count: int = counter("send operations done")
    tx_packets_count: int = counter("frames sent by the guest")
    tx_queue_event_count: int = counter("transmit queue notifications")
    tx_rate_limiter_event_count: int = counter("wake-ups by the transmit rate limiter")
    tx_rate_limiter_throttled: int = counter("times the transmit rate limiter held frames back")
    tx_spoofed_mac_count: int = counter("frames whose source address is not the card's")
    tx_remaining_reqs_count: int = counter("frames still in the queue when a notification had been handled")


class VsockMetrics(MetricGroup):
    """``vsock``. ``rx`` is towards the guest, ``tx`` from it."""

    activate_fails: int = counter(_ACTIVATE_FAILS)
    cfg_fails: int = counter(_CFG_FAILS)
    rx_queue_event_fails: int = counter("receive queue notifications that failed")
    tx_queue_event_fails: int = counter("transmit queue notifications that failed")
    ev_queue_event_fails: int = counter("event queue notifications that failed")
    muxer_event_fails: int = counter("failures of the host's listening side")
    conn_event_fails: int = counter("failures of a connection on the host's side")
    rx_queue_event_count: int = counter("receive queue notifications")
    tx_queue_event_count: int = counter("transmit queue notifications")
    rx_bytes_count: int = counter("payload bytes to the guest")
    tx_bytes_count: int = counter("payload bytes from the guest")
    rx_packets_count: int = counter("packets to the guest")
    tx_packets_count: int = counter("packets from the guest")
    conns_added: int = counter("connections that came to be")
    conns_killed: int = counter("connections ended by force")
    conns_removed: int = counter("connections gone")
    killq_resync: int = counter("times the list of connections to be ended was made anew")
    tx_flush_fails: int = counter("failures to hand buffered bytes to the host's side")
    tx_write_fails: int = counter("failures to hand bytes to the host's side")
    rx_read_fails: int = counter("failures to read from the host's side")


class EntropyMetrics(MetricGroup):
    """``entropy``."""

    activate_fails: int = counter(_ACTIVATE_FAILS)
    entropy_event_fails: int = counter("requests that failed")
    entropy_event_count: int = counter("requests handled")
    entropy_bytes: int = counter("bytes given")
    host_rng_fails: int = counter("failures of the host's generator")
    entropy_rate_limiter_throttled: int = counter("requests the rate limiter held back")
    rate_limiter_event_count: int = counter("wake-ups by the rate limiter")


class ConsoleMetrics(MetricGroup):
    """``console``: the virtio console, all ports together. ``rx`` is towards the guest, ``tx`` from it."""

    activate_fails: int = counter(_ACTIVATE_FAILS)
    cfg_fails: int = counter(_CFG_FAILS)
    event_fails: int = counter("queue notifications that failed")
    rx_queue_event_count: int = counter("receive queue notifications, of any port")
    tx_queue_event_count: int = counter("transmit queue notifications, of any port")
    control_queue_event_count: int = counter("control queue notifications, both ways")
    no_rx_avail_buffer: int = counter("times bytes for the guest found no receive buffer")
    rx_bytes_count: int = counter("bytes to the guest")
    tx_bytes_count: int = counter("bytes from the guest")
    rx_count: int = counter("receive buffers filled")
    tx_count: int = counter("transmit buffers taken")
    rx_fails: int = counter("failures to pass bytes to the guest")
    tx_fails: int = counter("failures to take bytes from the guest")
    tx_lost_bytes: int = counter("bytes from the guest that nobody took")
    tx_throttled: int = counter("times the guest was held back because the host did not read")
    control_count: int = counter("control messages handled")
    control_fails: int = counter("control messages refused")
    ports_opened: int = counter("ports the guest opened")
    ports_closed: int = counter("ports the guest closed")
