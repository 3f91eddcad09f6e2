"""The sandbox: attacks at every level of this machine, as this user and as the user nobody; hostile values and
messages."""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import socket
import struct
import subprocess
import sys
import time
from collections import Counter, OrderedDict, defaultdict, deque
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import sandbox_escapes
from hypothesis import given
from hypothesis import strategies as st

from lowrank_tune.rewards.sandbox import isolation, landlock, launch, seccomp
from lowrank_tune.rewards.sandbox.ipc import (
    MAX_MESSAGE_BYTES,
    Channel,
    ChannelClosed,
    ChannelTimeout,
    MessageTooLong,
)
from lowrank_tune.rewards.sandbox.launch import FOLDER, PACKAGE, Confined, Level, UnauthenticatedMessage
from lowrank_tune.rewards.sandbox.values import MAX_DEPTH, DeserializationError, NotSerializable, decode, encode

SOME = (
    "forks",
    "secret file",
    "parent's memory",
    "TCP",
    "disk",
    "signals to a sibling",
    "mount",
    "crash",
    "flood of everything",
)
ALONE = f"""import sys
for name in ("lowrank_tune", "lowrank_tune.rewards", "{PACKAGE}"):
    sys.modules[name] = type(sys)(name)
    sys.modules[name].__path__ = [{str(FOLDER)!r}]
sys.path.insert(0, {str(Path(__file__).parent)!r})
"""
"""Makes the package of the sandbox importable without the packages around it."""


@pytest.fixture(params=isolation.LEVELS)
def level(request: pytest.FixtureRequest) -> Level:
    if fault := isolation.probe_level(request.param).fault:
        pytest.skip(fault)
    return request.param  # type: ignore[no-any-return]


def test_isolation_is_available_where_the_kernel_supports_it() -> None:
    """Else a broken sandbox would be skipped below as one that the machine does not support."""
    if not landlock.version() or not seccomp.is_supported() or "Seccomp:" not in Path("/proc/self/status").read_text():
        pytest.skip("no Landlock or no seccomp here")
    assert isolation.probe_level("landlock").fault == "" and isolation.best_available() is not None


def test_reason_of_bubblewrap_is_its_own_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that forbids user namespaces: its level cannot be used, and the message has the cause. The program
    is anywhere on the path."""
    program = tmp_path / "bwrap"
    program.write_text("#!/bin/sh\necho first >&2\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(launch, "python", launch.python.__wrapped__)
    found = isolation.probe_level.__wrapped__("bubblewrap")
    assert str(found) == "bubblewrap: bwrap: No permissions to create new namespace"


def test_bubblewrap_that_does_not_end_has_no_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bwrap"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(launch, "START_SECONDS", 0.1)
    assert launch.bubblewrap_fault() == ""


def test_attacks_are_stopped_and_the_control_is_not(level: Level) -> None:
    assert sandbox_escapes.run_attacks(level, SOME) == {}


@pytest.mark.slow
def test_every_attack_is_stopped(level: Level) -> None:
    assert len(sandbox_escapes.QUICK) + len(sandbox_escapes.SLOW) >= 25
    assert sandbox_escapes.run_attacks(level, [*sandbox_escapes.QUICK, *sandbox_escapes.SLOW]) == {}


def test_attacks_would_get_through_without_a_sandbox() -> None:
    """Shows that the attacks work at all. None of these changes anything."""
    names = ("forks", "secret file", "TCP", "homes", "Unix socket", "vfork and posix_spawn")
    assert set(sandbox_escapes.run_attacks("none", names)) == {*names}


@functools.cache
def python_of_nobody() -> str | None:
    """Returns an interpreter that the user nobody may run with this package."""
    for path in (os.path.realpath(sys.executable), "/usr/bin/python3", "/usr/local/bin/python3"):
        code = f"import os, sys; open({str(FOLDER / 'child.py')!r}); sys.exit(sys.version_info < (3, 11))"
        try:
            if (
                subprocess.run(
                    [path, "-c", code], user=65534, group=65534, extra_groups=[], capture_output=True
                ).returncode
                == 0
            ):
                return path
        except OSError:
            continue
    return None


def as_nobody(*names: str) -> dict[str, Any]:
    if os.geteuid() != 0:
        pytest.skip("these tests run as an ordinary user already")
    if (python := python_of_nobody()) is None:
        pytest.skip("nobody may run no Python 3.11 here, or not read this checkout")
    command = [
        python,
        "-P",
        "-s",
        "-S",
        "-B",
        "-c",
        ALONE + "import sandbox_escapes; sandbox_escapes.main(sys.argv[1:])",
        *names,
    ]
    done = subprocess.run(
        command, user=65534, group=65534, extra_groups=[], capture_output=True, text=True, cwd="/", check=True
    )
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["user"] == 65534
    return report["levels"]  # type: ignore[no-any-return]


def stopped_at(results: dict[str, Any]) -> list[str]:
    """Returns the levels that can be used; a text in the results is the reason for another one."""
    assert {level: through for level, through in results.items() if through and not isinstance(through, str)} == {}
    return [level for level, through in results.items() if through == {}]


def test_attacks_of_a_user_without_privileges_are_stopped() -> None:
    assert (
        stopped_at(as_nobody("forks", "secret file", "TCP", "signals to a sibling", "unshare"))
        or isolation.best_available() is None
    )


@pytest.mark.slow
def test_every_attack_of_a_user_without_privileges_is_stopped() -> None:
    assert stopped_at(as_nobody()) or isolation.best_available() is None


def test_a_process_ends_with_its_parent(level: Level) -> None:
    """Also a process without a message so far, and one in a loop."""
    code = f"""import time
from lowrank_tune.rewards.sandbox.launch import Confined
from lowrank_tune.rewards.sandbox.values import encode
made = Confined("solver", {level!r})
made.ready()
made.send(encode({{"prompt": "", "code": "while True: pass", "entry": ""}}), time.monotonic() + 5)
print(made._process.pid, flush=True)
time.sleep(0.2)"""
    done = subprocess.run([sys.executable, "-c", ALONE + code], capture_output=True, text=True, check=True)
    pid, end = int(done.stdout), time.monotonic() + 5
    while group_is_running(pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not group_is_running(pid)


def group_is_running(group: int) -> bool:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(of) == group and state != "Z":
            return True
    return False


def test_an_ended_process_leaves_nothing(level: Level) -> None:
    made = Confined("solver", level)
    made.ready()
    pid = made._process.pid
    made.end()
    end = time.monotonic() + 2
    while group_is_running(pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert not group_is_running(pid)
    assert made.end() == "was killed by SIGKILL"


FORGED = """
import os, struct
message = PREFIX + b"l1;s6;loaded"
for number in range(3, 64):
    try:
        os.write(number, struct.pack("<I", len(message)) + message)
    except OSError:
        pass
"""


@pytest.mark.parametrize("prefix", ["b''", "bytes(16) + struct.pack('<I', 1)"])
def test_a_message_without_the_nonce_is_refused(level: Level, prefix: str) -> None:
    solver, deadline = Confined("solver", level), time.monotonic() + 20
    solver.ready()
    solver.send(encode({"prompt": "", "code": FORGED.replace("PREFIX", prefix), "entry": ""}), deadline)
    with pytest.raises(UnauthenticatedMessage):
        solver.receive(deadline)
    solver.end()


def test_a_level_at_which_an_attempt_succeeds_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A level is tested: if an attempt succeeds that must be refused, the level is not used."""
    monkeypatch.setattr(
        isolation, "PROBE", isolation.PROBE.replace('"opens sockets": lambda: socket.socket(', '"sums": lambda: max(')
    )
    found = [isolation.probe_level.__wrapped__(each) for each in isolation.LEVELS]
    assert (
        all(offer.fault for offer in found)
        and any(offer.fault == "code at this level sums" for offer in found)
        or isolation.best_available() is None
    )


# The filter of system calls, read as the kernel reads it.


def answer(number: int, *arguments: int, architecture: int | None = None) -> int:
    """Returns the result of the filter for a call: interprets the four instructions of classic BPF that it uses."""
    known, _ = seccomp.MACHINES[os.uname().machine]
    data = struct.pack(
        "<IIQ6Q", number, known if architecture is None else architecture, 0, *arguments, *[0] * (6 - len(arguments))
    )
    lines, place, loaded = list(struct.iter_unpack("<HBBI", seccomp.build_filter())), 0, 0
    while True:
        code, true, false, value = lines[place]
        place += 1
        if code == 0x20:
            (loaded,) = struct.unpack_from("<I", data, value)
        elif code == 0x06:
            return int(value)
        else:
            assert code in (0x15, 0x35)
            place += true if (loaded == value if code == 0x15 else loaded >= value) else false


@pytest.mark.skipif(not seccomp.is_supported(), reason="no list of system calls for this machine")
def test_the_filter_lets_through_what_it_should_and_no_more() -> None:
    allow, refuse, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
    numbers = seccomp.MACHINES[os.uname().machine][1]
    plain = {name for name in numbers if name not in seccomp.argument_rules() and name != "clone3"}
    assert {name for name in plain if answer(numbers[name]) != allow} == set() and len(plain) > 60
    own, other = os.getpid(), os.getppid()
    for name in ("kill", "tkill", "tgkill"):
        assert [answer(numbers[name], pid & 0xFFFFFFFF, 9) for pid in (own, other, 0, 1, -1, -own)] == [
            allow,
            *[refuse] * 5,
        ]
    assert [answer(numbers["clone"], flags) for flags in (0x3D0F00, 0x7D0F00, 17, 0x10000011, 0x4111)] == [
        allow,
        allow,
        *[refuse] * 3,
    ]
    assert [answer(numbers["prlimit64"], pid) for pid in (0, own)] == [allow, refuse]
    assert [answer(numbers["fcntl"], 3, command) for command in (1, 4, 8, 10, 15)] == [
        allow,
        allow,
        refuse,
        refuse,
        refuse,
    ]
    assert [answer(numbers["ioctl"], 0, command) for command in (0x5401, 0x5412)] == [allow, refuse]
    assert [answer(numbers["socketpair"], family) for family in (1, 2)] == [allow, refuse]
    assert answer(numbers["clone3"]) == 0x00050000 | errno.ENOSYS
    left = set(range(1024)) - set(numbers.values())
    assert {answer(number) for number in left} == {refuse}
    assert answer(numbers["read"], architecture=0x40000003) == kill and answer(0x40000000) == kill


# Values.

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.integers(0, 10**6000)
    | st.characters(categories=["Cs"]),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(), inner)
        | st.sets(st.integers())
        | st.frozensets(st.text())
    ),
    max_leaves=20,
)


def exact(value: Any) -> Any:
    """Returns the value with the name of every type, since 1 == True == 1.0."""
    if isinstance(value, dict):
        return type(value), [(exact(key), exact(each)) for key, each in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return type(value), [exact(each) for each in value]
    if isinstance(value, (set, frozenset)):
        return type(value), sorted(map(repr, map(exact, value)))
    return type(value), repr(value) if abs(value if isinstance(value, int) else 0) < 10**4000 else value


@given(PLAIN)
def test_decoded_values_equal_encoded_ones(value: Any) -> None:
    assert exact(decode(encode(value))) == exact(value)


def test_decoded_library_values_equal_encoded_ones() -> None:
    values = [
        Counter("abca"),
        OrderedDict(a=1),
        deque([1, 2]),
        Decimal("1.50"),
        Fraction(1, 3),
        range(1, 9, 3),
        bytearray(b"x"),
        int,
        ...,
    ]
    back = decode(encode(values))
    assert back == values and [type(each) for each in back] == [type(each) for each in values]
    made = defaultdict(list, a=[1])
    assert decode(encode(made)) == made
    assert math.isnan(decode(encode(math.nan))) and math.copysign(1, decode(encode(-0.0))) == -1


class Equal:
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


class Number(int):
    pass


def ring() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


@pytest.mark.parametrize(
    "value", [object(), Equal(), Number(3), [Number(3)], {"a": Equal()}, len, Equal, ring(), type("int", (), {})]
)
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(NotSerializable):
        encode(value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"i",
        b"i1",
        b"i 1;",
        b"i1_0;",
        b"l3;NN",
        b"l99999999999;",
        b"s5;abc",
        b"s-1;",
        b"s1;\xff",
        b"B2",
        b"m1;l0;N",
        b"S1;l0;",
        b"o1;",
        b"?",
        b"NN",
        b"l1;" * (MAX_DEPTH + 5) + b"N",
        b"l1;" * 100_000,
        b"Xx",
        b"X3;abc",
        b"T4;open",
        b"r0;1;0;",
        b"F3;1/0",
        b"d\x00",
    ],
)
def test_bytes_that_are_no_value_are_refused(data: bytes) -> None:
    with pytest.raises(DeserializationError):
        decode(data)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with suppress(DeserializationError):
        decode(data, lambda number: number)


# Messages.


@pytest.fixture
def ends() -> Any:
    mine, theirs = socket.socketpair()
    with mine, theirs:
        yield Channel(mine), theirs


def test_a_channel_has_a_deadline_and_a_longest_message(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    start = time.monotonic()
    with pytest.raises(ChannelTimeout):
        channel.receive(start + 0.05)
    theirs.sendall(struct.pack("<I", 5) + b"hel")
    with pytest.raises(ChannelTimeout):  # a beginning is not a message
        channel.receive(time.monotonic() + 0.05)
    theirs.sendall(b"lo" + struct.pack("<I", 0))
    assert channel.receive(time.monotonic() + 1) == b"hello" and channel.receive(time.monotonic() + 1) == b""
    with pytest.raises(ChannelTimeout):  # the other side does not read
        channel.send(bytes(64 << 20), time.monotonic() + 0.05)
    theirs.sendall(struct.pack("<I", MAX_MESSAGE_BYTES + 1))
    with pytest.raises(MessageTooLong):
        channel.receive(time.monotonic() + 1)
    assert time.monotonic() - start < 2


def test_a_closed_channel_raises(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    assert not channel.closed()
    theirs.close()
    assert channel.closed()
    with pytest.raises(ChannelClosed):
        channel.receive(time.monotonic() + 1)
