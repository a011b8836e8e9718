"""The virtio-mmio transport, version 2 (virtio 1.2, section 4.2): one page of registers in front of a device.

The registers live in ``page``. A read gives what stands there, whether it is answered here or, with the page shown to
the guest as read-only memory, by the processor alone; a write comes here in either case. So everything the guest may
read is kept in the page at every moment.

With QueueNotify and InterruptACK taken by ioeventfds, a request costs no exit at all. InterruptStatus then keeps its
first bit once it is set: nobody hears of its acknowledgement, and a driver that finds it set too often only looks at
its rings. The second bit, configuration change, is acknowledged here, for a change must not be missed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

from asyncvmm.devices.checks import entry, mapping
from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.devices.virtio.ids import (
    KNOWN_STATUS,
    STATUS_DEVICE_NEEDS_RESET,
    STATUS_DRIVER_OK,
    STATUS_FAILED,
    STATUS_FEATURES_OK,
    TRANSPORT_FEATURES,
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
)
from asyncvmm.devices.virtio.memory import GuestFault, GuestView
from asyncvmm.devices.virtio.mmio_state import MmioState, is_acceptable, restore_queues
from asyncvmm.devices.virtio.queue import Queue
from asyncvmm.devices.virtio.registers import (
    CONFIG,
    CONFIG_GENERATION,
    DEVICE_FEATURES,
    DEVICE_FEATURES_SEL,
    DRIVER_FEATURES,
    DRIVER_FEATURES_SEL,
    INTERRUPT_ACK,
    INTERRUPT_CONFIG_CHANGE,
    INTERRUPT_STATUS,
    INTERRUPT_USED_BUFFER,
    PAGE_BYTES,
    QUEUE_DESC_HIGH,
    QUEUE_DESC_LOW,
    QUEUE_DEVICE_HIGH,
    QUEUE_DEVICE_LOW,
    QUEUE_DRIVER_HIGH,
    QUEUE_DRIVER_LOW,
    QUEUE_NOTIFY,
    QUEUE_NUM,
    QUEUE_NUM_MAX,
    QUEUE_READY,
    QUEUE_SEL,
    STATUS,
    identify,
)
from asyncvmm.devices.virtio.service import QueueService

_LOW: Final = (1 << 32) - 1
_ADDRESSES: Final = {
    QUEUE_DESC_LOW: ("descriptors", 0),
    QUEUE_DESC_HIGH: ("descriptors", 32),
    QUEUE_DRIVER_LOW: ("driver_area", 0),
    QUEUE_DRIVER_HIGH: ("driver_area", 32),
    QUEUE_DEVICE_LOW: ("device_area", 0),
    QUEUE_DEVICE_HIGH: ("device_area", 32),
}
_UP_OR_NOT: Final = STATUS_DRIVER_OK | STATUS_DEVICE_NEEDS_RESET | STATUS_FAILED


class VirtioMmio(QueueService):
    """One device behind its registers.

    page: where the registers are kept, PAGE_BYTES long. lock: the device's; it must be one that its holder can take
    again. interrupt: raises the line, an edge. notify: a kick that came by a register write (an ioeventfd takes them
    elsewhere). gave_up: the driver asked for something impossible, in words; once until it resets the device. The three
    are called with the lock held, from any thread.

    ``held`` is set, with the lock taken, while the machine stands still: the device then has no driver. Whoever clears
    it has every queue kicked.
    """

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestView,
        lock: AbstractContextManager[object],
        *,
        interrupt: Callable[[], None],
        notify: Callable[[int], None] = lambda index: None,
        gave_up: Callable[[str], None] = lambda fault: None,
        page: memoryview | None = None,
    ) -> None:
        self.device = device
        self.held = False
        self._memory = memory
        self._lock = lock
        self._interrupt, self._notify_loop, self._gave_up = interrupt, notify, gave_up
        self._page = memoryview(bytearray(PAGE_BYTES)) if page is None else page
        self._words = self._page.cast("I")
        self._offered = device.features | TRANSPORT_FEATURES
        self._wanted = self._features_sel = self._driver_features_sel = self._queue_sel = 0
        self._writers = {
            DEVICE_FEATURES_SEL: self._select_device_features,
            DRIVER_FEATURES: self._write_driver_features,
            DRIVER_FEATURES_SEL: self._select_driver_features,
            QUEUE_SEL: self._select_queue,
            QUEUE_NUM: self._write_queue_size,
            QUEUE_READY: self._write_queue_ready,
            QUEUE_NOTIFY: self._write_notify,
            INTERRUPT_ACK: self._acknowledge,
            STATUS: self._write_status,
        }
        identify(self._words, device.device_id)
        self._show_config()
        self._clear()
        device.transport = self

    # -- registers, on a vCPU thread with the lock held --------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """A read of ``size`` bytes (1 to 8) at ``offset``."""
        return int.from_bytes(self._page[offset : offset + size], "little")

    def write(self, offset: int, value: int, size: int) -> None:
        """A write. Anything but an aligned word to a register that can be written is ignored (4.2.2.2)."""
        if offset >= CONFIG:
            self._write_config(offset - CONFIG, value.to_bytes(size, "little"))
        elif size != 4:
            return
        elif offset in self._writers:
            self._writers[offset](value)
        elif offset in _ADDRESSES:
            self._write_address(*_ADDRESSES[offset], value)

    @property
    def status(self) -> int:
        """The device status field."""
        return self._words[STATUS // 4]

    @property
    def running(self) -> bool:
        """Whether the driver is there, neither side has given up, and the machine does not stand still."""
        return not self.held and self._words[STATUS // 4] & _UP_OR_NOT == STATUS_DRIVER_OK

    @property
    def _is_up(self) -> bool:
        return self.status & _UP_OR_NOT == STATUS_DRIVER_OK

    @property
    def needs_reset(self) -> bool:
        """Whether the driver asked for something impossible and was told so."""
        return bool(self.status & STATUS_DEVICE_NEEDS_RESET)

    def _select_device_features(self, value: int) -> None:
        self._features_sel = value
        self._words[DEVICE_FEATURES // 4] = self._offered >> 32 * value & _LOW if value < 2 else 0

    def _select_driver_features(self, value: int) -> None:
        self._driver_features_sel = value

    def _write_driver_features(self, value: int) -> None:
        if self.status & STATUS_FEATURES_OK or self._driver_features_sel > 1:
            return
        shift = 32 * self._driver_features_sel
        self._wanted = self._wanted & ~(_LOW << shift) | value << shift

    def _select_queue(self, value: int) -> None:
        self._queue_sel = value
        queue = self._queue()
        self._words[QUEUE_NUM_MAX // 4] = queue.max_size if queue else 0
        self._words[QUEUE_READY // 4] = queue.ready if queue else 0

    def _queue(self) -> Queue | None:
        queues = self.device.queues
        return queues[self._queue_sel] if self._queue_sel < len(queues) else None

    def _open_queue(self) -> Queue | None:
        """The selected queue, if it can be set up now: features are settled, and it is not in use."""
        queue = self._queue()
        settled = self.status & (STATUS_FEATURES_OK | STATUS_FAILED) == STATUS_FEATURES_OK
        if queue is None or queue.ready or not settled:
            return None
        return queue

    def _write_queue_size(self, value: int) -> None:
        if queue := self._open_queue():
            queue.size = value

    def _write_address(self, name: str, shift: int, value: int) -> None:
        if queue := self._open_queue():
            setattr(queue, name, getattr(queue, name) & ~(_LOW << shift) | value << shift)

    def _write_queue_ready(self, value: int) -> None:
        if value == 0:
            self._stop_queue()
        elif value == 1 and (queue := self._open_queue()):
            try:
                self._enable(queue)
            except GuestFault as fault:
                self._fail("cfg_fails", fault)
            self._words[QUEUE_READY // 4] = queue.ready

    def _enable(self, queue: Queue) -> None:
        queue.enable(
            self._memory,
            event_idx=self.device.has(VIRTIO_F_EVENT_IDX),
            indirect=self.device.has(VIRTIO_F_INDIRECT_DESC),
        )

    def _stop_queue(self) -> None:
        """QueueReady = 0: at the return of this write the guest has its memory back."""
        if queue := self._queue():
            queue.reset()
            self._words[QUEUE_READY // 4] = 0

    def _write_notify(self, value: int) -> None:
        if value < len(self.device.queues) and self._is_up:
            self._notify(value)

    def _acknowledge(self, value: int) -> None:
        self._words[INTERRUPT_STATUS // 4] &= ~value

    def _write_config(self, offset: int, data: bytes) -> None:
        if offset + len(data) > len(self.device.config):
            self.device.count_failure("cfg_fails")
            return
        try:
            self.device.write_config(offset, data)
            self._page[CONFIG : CONFIG + len(self.device.config)] = self.device.config
        except GuestFault as fault:
            self._fail("cfg_fails", fault)

    # -- status (2.1, 3.1.1) ---------------------------------------------------------------------------------------

    def _write_status(self, value: int) -> None:
        before = self.status
        value &= _LOW
        if value == 0:
            self.reset()
        elif not (before & ~STATUS_DEVICE_NEEDS_RESET & ~value or value & ~KNOWN_STATUS):
            # Else a bit was taken back, or is none: the driver must not.
            self._add_status(before, value & ~before & ~STATUS_DEVICE_NEEDS_RESET)

    def _add_status(self, before: int, added: int) -> None:
        if added & STATUS_FEATURES_OK and not self._accept_features():
            added &= ~STATUS_FEATURES_OK
        if added & STATUS_DRIVER_OK and not (before | added) & STATUS_FEATURES_OK:
            added &= ~STATUS_DRIVER_OK
        self._words[STATUS // 4] = before | added
        if added & STATUS_DRIVER_OK:
            self._activate()

    def _accept_features(self) -> bool:
        if not is_acceptable(self._wanted, self._offered):
            return False
        self.device.acked = self._wanted
        return True

    def _activate(self) -> None:
        try:
            self.device.activate()
            self._kick_what_waits()
        except GuestFault as fault:
            self._fail("activate_fails", fault)

    def _kick_what_waits(self) -> None:
        """Chains that nobody will kick for any more: made available before DRIVER_OK, as Linux' balloon driver does."""
        for index, queue in enumerate(self.device.queues):
            if queue.available():
                self._notify(index)

    def reset(self) -> None:
        """As after power-on. When it returns, no guest memory of former queues is written any more."""
        for queue in self.device.queues:
            queue.reset()
        self._clear()
        self.device.acked = 0
        self.device.reset()

    # -- from the loop ---------------------------------------------------------------------------------------------

    def _queues(self) -> Sequence[Queue]:
        return self.device.queues

    def _tell_used(self, indices: Sequence[int]) -> None:
        """One interrupt for all of them: the driver looks which it was."""
        if self.running:
            self._words[INTERRUPT_STATUS // 4] |= INTERRUPT_USED_BUFFER
            self._interrupt()

    def _notify(self, index: int) -> None:
        self._notify_loop(index)

    def _fault(self, fault: GuestFault) -> None:
        self._fail("event_fails", fault)

    def config_changed(self) -> None:
        """See device.Transport."""
        with self._lock:
            self._show_config()
            if self.status & STATUS_DRIVER_OK:
                self._words[INTERRUPT_STATUS // 4] |= INTERRUPT_CONFIG_CHANGE
                self._interrupt()

    def _show_config(self) -> None:
        """The generation moves before and after: a reader in between sees two different ones, and reads again."""
        config = self.device.config
        self._move_generation()
        self._page[CONFIG : CONFIG + len(config)] = config
        self._move_generation()

    def _move_generation(self) -> None:
        self._words[CONFIG_GENERATION // 4] = (self._words[CONFIG_GENERATION // 4] + 1) & _LOW

    def _fail(self, counter: str, fault: GuestFault) -> None:
        """The driver asked for something impossible: the device stops and says so (2.1.1)."""
        self.device.count_failure(counter)
        if not self.needs_reset:
            self._gave_up(str(fault))
        self._words[STATUS // 4] |= STATUS_DEVICE_NEEDS_RESET
        if self.status & STATUS_DRIVER_OK:
            self._words[INTERRUPT_STATUS // 4] |= INTERRUPT_CONFIG_CHANGE
            self._interrupt()

    # -- the page --------------------------------------------------------------------------------------------------

    def _clear(self) -> None:
        self._wanted = 0
        self._driver_features_sel = 0
        self._words[STATUS // 4] = self._words[INTERRUPT_STATUS // 4] = 0
        self._select_device_features(0)
        self._select_queue(0)

    def close(self) -> None:
        """Touch neither page nor guest memory any more. The lock must be held, or every thread have ended."""
        for queue in self.device.queues:
            queue.reset()
        self._words.release()
        self._page.release()
        self._page = memoryview(bytearray(PAGE_BYTES))
        self._words = self._page.cast("I")

    # -- snapshots -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Transport, queues and device, as plain values. The lock must be held, and the device drained."""
        registers = MmioState(
            device_id=self.device.device_id,
            status=self.status,
            wanted=self._wanted,
            acked=self.device.acked,
            features_sel=self._features_sel,
            driver_features_sel=self._driver_features_sel,
            queue_sel=self._queue_sel,
            interrupt_status=self._words[INTERRUPT_STATUS // 4],
            config_generation=self._words[CONFIG_GENERATION // 4],
            config=bytes(self.device.config),
        )
        queues = [queue.state() for queue in self.device.queues]
        return {**registers.record(), "queues": queues, "device": self.device.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become what ``state`` says. Raises ConfigError for what no such device can have been; it is reset then."""
        self.reset()
        try:
            self._restore(state)
        except BaseException:
            self.reset()
            raise
        self._kick_all()

    def _restore(self, state: Mapping[str, Any]) -> None:
        device, registers = self.device, MmioState.of_record(state, self.device, self._offered)
        self._restore_registers(registers)
        restore_queues(entry(state, "queues"), device, self._memory, self.status)
        device.restore_config(registers.config)
        device.restore(mapping(state, "device"))
        self._select_queue(registers.queue_sel)
        if device.config == registers.config:
            self._page[CONFIG : CONFIG + len(device.config)] = registers.config
        else:
            self._show_config()

    def _restore_registers(self, saved: MmioState) -> None:
        self._wanted, self.device.acked = saved.wanted, saved.acked
        self._driver_features_sel = saved.driver_features_sel
        self._select_device_features(saved.features_sel)
        self._words[STATUS // 4] = saved.status
        self._words[INTERRUPT_STATUS // 4] = saved.interrupt_status
        self._words[CONFIG_GENERATION // 4] = saved.config_generation

    def _kick_all(self) -> None:
        """Chains may wait, or rings be broken; both is seen where a kick is answered."""
        for index, queue in enumerate(self.device.queues):
            if queue.ready and self.running:
                self._notify(index)
