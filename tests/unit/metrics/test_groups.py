"""The names are an interface that other programs' dashboards know: each is spelt out here."""

from __future__ import annotations

import pytest

from asyncvmm.metrics.counters import kinds
from asyncvmm.metrics.groups import GROUPS

NAMES = {
    "balloon": """activate_fails inflate_count stats_updates_count stats_update_fails deflate_count event_fails
        free_page_report_count free_page_report_freed free_page_report_fails free_page_hint_count free_page_hint_freed
        free_page_hint_fails""",
    "block": """activate_fails cfg_fails no_avail_buffer event_fails execute_fails invalid_reqs_count flush_count
        queue_event_count rate_limiter_event_count update_count update_fails read_bytes write_bytes read_count
        write_count read_agg write_agg rate_limiter_throttled_events io_engine_throttled_events
        remaining_reqs_count""",
    "entropy": """activate_fails entropy_event_fails entropy_event_count entropy_bytes host_rng_fails
        entropy_rate_limiter_throttled rate_limiter_event_count""",
    "i8042": "error_count missed_read_count missed_write_count read_count reset_count write_count",
    "latencies_us": """full_create_snapshot diff_create_snapshot load_snapshot pause_vm resume_vm
        vmm_full_create_snapshot vmm_diff_create_snapshot vmm_load_snapshot vmm_pause_vm vmm_resume_vm""",
    "net": """activate_fails cfg_fails no_rx_avail_buffer no_tx_avail_buffer event_fails rx_queue_event_count
        rx_event_rate_limiter_count rx_rate_limiter_throttled rx_tap_event_count rx_bytes_count rx_packets_count
        rx_fails rx_count tap_read_fails tap_write_fails tap_write_agg tx_bytes_count tx_malformed_frames tx_fails
        tx_count tx_packets_count tx_queue_event_count tx_rate_limiter_event_count tx_rate_limiter_throttled
        tx_spoofed_mac_count tx_remaining_reqs_count""",
    "signals": "sigbus sigsegv sigxfsz sigxcpu sigpipe sighup sigill",
    "uart": """error_count flush_count missed_read_count missed_write_count read_count write_count
        rate_limiter_dropped_bytes""",
    "vcpu": """exit_io_in exit_io_out exit_mmio_read exit_mmio_write failures kvmclock_ctrl_fails exit_io_in_agg
        exit_io_out_agg exit_mmio_read_agg exit_mmio_write_agg""",
    "vmm": "panic_count",
    "vsock": """activate_fails cfg_fails rx_queue_event_fails tx_queue_event_fails ev_queue_event_fails
        muxer_event_fails conn_event_fails rx_queue_event_count tx_queue_event_count rx_bytes_count tx_bytes_count
        rx_packets_count tx_packets_count conns_added conns_killed conns_removed killq_resync tx_flush_fails
        tx_write_fails rx_read_fails""",
}
STORES = {"latencies_us": set(NAMES["latencies_us"].split()), "vmm": {"panic_count"}}
STORES["signals"] = set(NAMES["signals"].split()) - {"sigpipe"}


@pytest.mark.parametrize("group", NAMES)
def test_a_group_has_the_fields_its_consumers_know(group: str) -> None:
    assert list(GROUPS[group]().flush()) == NAMES[group].split()


def test_the_console_is_the_only_group_of_our_own() -> None:
    assert GROUPS.keys() - NAMES.keys() == {"console"}


@pytest.mark.parametrize("group", GROUPS)
def test_fields_are_counters_but_for_stores_and_aggregates(group: str) -> None:
    of_kind: dict[str, set[str]] = {"counter": set(), "store": set(), "aggregate": set()}
    for name, kind in kinds(GROUPS[group]).items():
        of_kind[kind].add(name)
    assert of_kind["store"] == STORES.get(group, set())
    assert of_kind["aggregate"] == {name for name in GROUPS[group]().flush() if name.endswith("_agg")}


@pytest.mark.parametrize("group", GROUPS)
def test_every_field_says_what_it_counts(group: str) -> None:
    assert all(field.meaning for field in GROUPS[group].fields.values())
