"""The guest contract against a model of it: any guest, any lines on either port, in any order."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from asyncvmm.effects import Port
from asyncvmm.events.contract import GuestContract
from asyncvmm.events.lines import Line
from asyncvmm.events.markers import STAGES, BootTime, ClockReading, Heartbeat, PreExec, Ready, WorkloadExit
from asyncvmm.timing.profiles import GuestBootProfile

ports = st.sampled_from(("console", "control"))
numbers = st.integers(0, (1 << 64) - 1)
NOISE = (b"", b"Welcome", b"ready", b" READY", b"BOOT_TIMES are good")
BAD_BOOT_TIMES = (b"BOOT_TIME:ready:-1", b"BOOT_TIME:ready", b"BOOT_TIME:ready:1_000", b"BOOT_TIME::1", b"BOOT_TIME")
BAD_OTHERS = (b"heartbeat counter=x", b"listener proto=tcp port=0", b"workload-exit code=256", b"clock tsc=1 ns=1")


class ContractModel(RuleBasedStateMachine):
    """Follows the contract in a few words, and compares after each line."""

    def __init__(self) -> None:
        super().__init__()
        self.contract = GuestContract()
        self.stages: dict[str, int] = {}
        self.ready = self.ready_on_control = self.started = self.clock_read = False
        self.malformed = self.ignored = 0

    def say(self, port: Port, text: bytes, *, truncated: bool = False) -> object:
        """What the contract makes of the line."""
        return self.contract.line(port, Line(text, 0, truncated))

    def deaf(self, port: Port) -> bool:
        """Whether the console is the workload's by now."""
        return port == "console" and self.started

    def expect(self, found: object, marker: object, counts: bool) -> None:
        """The marker if it counts; else it was ignored."""
        assert found == (marker if counts else None)
        self.ignored += not counts

    @rule(port=ports, stage=st.sampled_from(STAGES), guest_ns=numbers)
    def boot_time(self, port: Port, stage: str, guest_ns: int) -> None:
        """The last value of a stage stays, until command_loop has come."""
        found = self.say(port, f"BOOT_TIME:{stage}:{guest_ns}".encode())
        if self.deaf(port):
            assert found is None
            return
        counts = "command_loop" not in self.stages
        self.expect(found, BootTime(stage, guest_ns), counts)
        if counts:
            self.stages[stage] = guest_ns

    @rule(port=ports)
    def say_ready(self, port: Port) -> None:
        """READY counts once."""
        found = self.say(port, b"READY")
        if self.deaf(port):
            assert found is None
            return
        self.expect(found, Ready(), not self.ready)
        self.ready = True
        self.ready_on_control |= port == "control"

    @rule(port=ports)
    def start(self, port: Port) -> None:
        """The workload starts once."""
        found = self.say(port, b"workload-pre-exec")
        if self.deaf(port):
            assert found is None
            return
        self.expect(found, PreExec(), not self.started)
        self.started = True

    @rule(tsc=st.integers(0, 1 << 32), ns=numbers)
    def read_clock(self, tsc: int, ns: int) -> None:
        """A reading counts once, before command_loop."""
        found = self.say("control", f"clock tsc={tsc} ns={ns} tsc_end={tsc}".encode())
        counts = not self.clock_read and "command_loop" not in self.stages
        self.expect(found, ClockReading(tsc, ns, tsc), counts)
        self.clock_read = True

    @rule(counter=numbers, code=st.integers(0, 255))
    def live_and_end(self, counter: int, code: int) -> None:
        """These count on the control line, always."""
        assert self.say("control", f"heartbeat counter={counter}".encode()) == Heartbeat(counter)
        assert self.say("control", f"workload-exit code={code}".encode()) == WorkloadExit(code)

    @rule(text=st.sampled_from((b"heartbeat counter=1", b"workload-exit code=0", b"clock tsc=1 ns=1 tsc_end=1")))
    def pretend_to_be_pid_1(self, text: bytes) -> None:
        """These never count on the console."""
        assert self.say("console", text) is None

    @rule(port=ports, text=st.sampled_from(BAD_BOOT_TIMES))
    def stammer(self, port: Port, text: bytes) -> None:
        """A malformed BOOT_TIME is counted and changes nothing."""
        assert self.say(port, text) is None
        self.malformed += not self.deaf(port)

    @rule(port=ports, text=st.sampled_from(BAD_OTHERS))
    def mumble(self, port: Port, text: bytes) -> None:
        """Other malformed markers are for the control line to make."""
        assert self.say(port, text) is None
        self.malformed += port == "control"

    @rule(port=ports, text=st.sampled_from((b"BOOT_TIME:ready:5", b"READY", b"workload-pre-exec")))
    def break_off(self, port: Port, text: bytes) -> None:
        """A marker with bytes missing is none."""
        assert self.say(port, text, truncated=True) is None
        self.malformed += port == "control" or (not self.started and text.startswith(b"BOOT_TIME"))

    @rule(port=ports, digits=numbers)
    def name_an_unknown_stage(self, port: Port, digits: int) -> None:
        """An unknown stage is ignored."""
        assert self.say(port, f"BOOT_TIME:coffee:{digits}".encode()) is None
        self.ignored += not self.deaf(port)

    @rule(port=ports, text=st.sampled_from(NOISE))
    def chat(self, port: Port, text: bytes) -> None:
        """Other lines are nothing."""
        assert self.say(port, text) is None
        self.malformed += text.startswith(b"BOOT_TIME") and not self.deaf(port)

    @invariant()
    def it_is_as_the_model_says(self) -> None:
        """Everything that can be asked of it."""
        contract = self.contract
        assert contract.profile == GuestBootProfile(**{f"{stage}_ns": value for stage, value in self.stages.items()})
        assert contract.capturing == ("command_loop" not in self.stages)
        assert (contract.ready, contract.ready_on_control) == (self.ready, self.ready_on_control)
        assert (contract.started, contract.panicked) == (self.started, False)
        assert (contract.malformed, contract.ignored) == (self.malformed, self.ignored)


TestContractModel = ContractModel.TestCase
TestContractModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
