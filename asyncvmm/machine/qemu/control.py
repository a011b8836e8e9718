"""QMP on the event loop: commands awaited by their replies, events handed on as they come."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from asyncvmm.errors import MachineError, StateError
from asyncvmm.machine.qemu.channel import Channel
from asyncvmm.machine.qemu.qmp import NEGOTIATE_ID, RUN_ID, QmpDecoder, QmpEvent, QmpReply, encode_command, opening


class QmpRefused(MachineError):
    """QEMU refused a command, and lives on."""


class QmpControl:
    """The conversation with one QEMU, from before it is started. ``negotiated`` resolves when it answers at all,
    ``started`` when its vCPUs run, or when it has read a saved state (``restores``) and holds them.

    ``on_event`` takes QEMU's events, ``on_failure`` a breach of the protocol, ``on_running`` hears the reply to the
    first ``cont``, which is sent once the vCPUs may run, or that the state is read; all on the loop. ``before_running``
    are commands, and their arguments, to be carried out before that; one that QEMU refuses is a failure, too.
    """

    def __init__(
        self,
        channel: Channel,
        on_event: Callable[[QmpEvent], None],
        on_failure: Callable[[MachineError], None],
        on_running: Callable[[], None] = lambda: None,
        before_running: Sequence[tuple[str, Mapping[str, Any]]] = (),
        *,
        restores: bool = False,
    ) -> None:
        self._channel = channel
        self._on_event = on_event
        self._on_failure = on_failure
        self._on_running = on_running
        self._decoder = QmpDecoder()
        self._ids = itertools.count(1)
        self._replies: dict[int | str | None, asyncio.Future[Any]] = {}
        self._restores = restores
        self.has_started = False  # unlike ``started``, whose waiter may have cancelled it
        self.negotiated = self._expect(NEGOTIATE_ID)
        self.started = self._expect(RUN_ID)
        first = b"".join(self._encode_first(*command) for command in before_running)
        channel.write_now(opening(first, run=not restores))
        channel.watch(self.read)

    @property
    def reads_state(self) -> bool:
        """Whether QEMU is up, and has a state to read."""
        answered = self.negotiated.done() and not self.negotiated.cancelled() and self.negotiated.exception() is None
        return self._restores and answered

    async def execute(
        self, name: str, arguments: Mapping[str, Any] | None = None, *, descriptor: int | None = None
    ) -> Any:
        """Run a command; what it returns. A copy of ``descriptor`` goes with it.

        Raises MachineError if QEMU refuses it or ends meanwhile.
        """
        id_ = next(self._ids)
        reply = self._expect(id_)
        try:
            await self._channel.write(encode_command(name, id_, arguments), descriptor)
            return await reply
        except StateError as error:
            raise MachineError(f"QMP {name}", expected="a reply", found="QEMU has ended") from error
        finally:
            self._replies.pop(id_, None)

    def ask(self, name: str, on_answer: Callable[[Any], None]) -> None:
        """Run a command from a callback. ``on_answer`` takes what it returns; a refusal goes unheard."""
        id_ = next(self._ids)

        def answered(reply: asyncio.Future[Any]) -> None:
            self._replies.pop(id_, None)
            if not reply.cancelled() and reply.exception() is None:
                on_answer(reply.result())

        self._expect(id_).add_done_callback(answered)
        try:
            self._channel.write_now(encode_command(name, id_))
        except OSError:
            self._replies[id_].cancel()

    def read(self) -> bool:
        """Take in what QEMU has said, a bounded piece of it; whether there was any."""
        data = self._channel.read()
        try:
            for message in self._decoder.feed(data):
                if isinstance(message, QmpEvent):
                    self._take_event(message)
                elif isinstance(message, QmpReply):
                    if message.id == RUN_ID and message.error is None:
                        self._on_running()
                    self._settle(message)
        except MachineError as error:
            self.close(error)
            self._on_failure(error)
            return False
        return bool(data)

    def close(self, error: MachineError | None = None) -> None:
        """End the conversation; whoever waits for a reply gets ``error``. May be called again."""
        self._channel.close()
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(error or MachineError("QMP", expected="a reply", found="QEMU has ended"))
                reply.exception()  # counts as seen: there may be nobody left to await it
        self._replies.clear()

    def _encode_first(self, name: str, arguments: Mapping[str, Any]) -> bytes:
        id_ = next(self._ids)

        def answered(reply: asyncio.Future[Any]) -> None:
            error = reply.exception()
            if self._replies.pop(id_, None) is not None and isinstance(error, MachineError):
                self.close(error)
                self._on_failure(error)

        self._expect(id_).add_done_callback(answered)
        return encode_command(name, id_, arguments)

    def _expect(self, id_: int | str) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._replies[id_] = future
        return future

    def _take_event(self, event: QmpEvent) -> None:
        # Sent before the first vCPU runs, where the reply to ``cont`` is sent after: a guest that ends QEMU at once
        # ends it before the reply.
        if not self.has_started and self._is_start(event):
            self.has_started = True
            self._settle(QmpReply(RUN_ID))
            if self._restores:
                self._on_running()
        self._on_event(event)

    def _is_start(self, event: QmpEvent) -> bool:
        if self._restores:
            return event.name == "MIGRATION" and event.data.get("status") == "completed"
        return event.name == "RESUME"

    def _settle(self, reply: QmpReply) -> None:
        future = self._replies.get(reply.id)
        if future is None or future.done():
            return
        if reply.error is None:
            future.set_result(reply.value)
        else:
            future.set_exception(QmpRefused("QMP", expected="success", found=reply.error))
            future.exception()  # counts as seen: the one who asked may have been cancelled
