"""What code in a sandbox may try. Each text has a function `attack(world)` that returns True where it got through, and
may raise, hang or die.

`world` is what `World` makes: things outside that are worth having, all of them open to everyone as far as their
permissions go. It needs the standard library alone, so that another user, with another Python, can run it.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lowrank_tune.rewards.sandbox import isolation
from lowrank_tune.rewards.sandbox.ipc import ChannelClosed, ChannelTimeout, MessageTooLong
from lowrank_tune.rewards.sandbox.launch import Confined, Level, UnauthenticatedMessage
from lowrank_tune.rewards.sandbox.values import decode, encode

SECRET = "swordfish-in-a-file"
HEAD = """
import ctypes, os, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def system(*arguments):
    return libc.syscall(*[each if isinstance(each, bytes) else ctypes.c_long(each) for each in arguments])
def opens(*attempts):
    for attempt in attempts:
        try:
            if attempt() is not False:
                return True
        except OSError:
            pass
    return False
"""
QUICK = {
    "forks": "def attack(w):\n    for _ in range(60):\n        if os.fork() == 0:\n            os._exit(0)\n    "
    "return True",
    "daemon": """
def attack(w):
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        time.sleep(2)
        open(w["folder"] + "/daemon", "w")
        os._exit(0)
    return True""",
    "vfork and posix_spawn": """
def attack(w):
    return opens(lambda: os.posix_spawn('/bin/true', ['true'], {}), lambda: subprocess.run(['/bin/true']))""",
    "raw clone": """
def attack(w):
    child = system(w['numbers']['clone'], 17, 0, 0, 0, 0)
    if child == 0:
        os._exit(0)
    return child > 0""",
    "raw clone3": """
def attack(w):
    arguments = (ctypes.c_uint64 * 8)(0, 0, 0, 0, 17)
    child = system(435, ctypes.addressof(arguments), 64)
    if child == 0:
        os._exit(0)
    return child > 0""",
    "exec": "def attack(w): return opens(lambda: os.execv('/bin/true', ['true']), lambda: os.execv(sys.executable, "
    "['x', '-c', '']))",
    "secret file": "def attack(w): return opens(lambda: open(w['secret']).read())",
    "secret file beneath an open folder": """
def attack(w):
    return opens(*[lambda n=n: os.open('../' * 12 + w['secret'].lstrip('/'), os.O_RDONLY, dir_fd=n) for n in range(3, 64)])""",  # noqa: E501
    "secret by handle": """
def attack(w):
    handle, mount = ctypes.create_string_buffer((128).to_bytes(4, sys.byteorder) + bytes(140)), ctypes.c_int()
    libc.name_to_handle_at(-100, w['secret'].encode(), handle, ctypes.byref(mount), 0)
    return any(libc.open_by_handle_at(n, handle, 0) >= 0 for n in [-100, *range(3, 16)])""",
    "system files": "def attack(w): return opens(*[lambda p=p: open(p).read() for p in ('/etc/passwd', "
    "'/etc/hostname', '/etc/shadow')])",
    "homes": "def attack(w): return opens(*[lambda p=p: os.listdir(p) for p in ('/home', '/etc', '/var', "
    "w['folder'], '/proc')])",
    "package": "def attack(w): return opens(lambda: open(w['package'] + '/solver.py').read(), lambda: "
    "os.listdir(w['package']))",
    "symlink": "def attack(w): return opens(lambda: os.symlink(w['secret'], '/tmp/l'), lambda: os.link(w['secret'], "
    "w['folder'] + '/l'))",
    "proc roots": "def attack(w): return opens(*[lambda p=p: open(f'/proc/{p}/root' + w['secret']).read() for p in "
    "(1, 'self', w['parent'])])",
    "own environment": """
def attack(w):
    return any('TOKEN' in name for name in os.environ) or opens(lambda: b'TOKEN' in open('/proc/self/environ', 'rb').read())""",  # noqa: E501
    "environment of the C "
    "library": "def attack(w):\n    libc.getenv.restype = ctypes.c_char_p\n    return libc.getenv(b'TOKEN') is not "
    "None",
    "parent's environment": "def attack(w): return opens(lambda: open(f\"/proc/{w['parent']}/environ\", 'rb').read())",
    "parent's memory": """
def attack(w):
    def read():
        with open(f"/proc/{w['parent']}/mem", 'rb') as memory:
            memory.seek(w['address'])
            return memory.read(8)
    return opens(read)""",
    "process_vm_readv": """
def attack(w):
    there, here = ctypes.create_string_buffer(8), ctypes.c_void_p * 2
    mine, theirs = here(ctypes.addressof(there), 8), here(w['address'], 8)
    return any(libc.process_vm_readv(p, mine, 1, theirs, 1, 0) > 0 for p in (w['parent'], os.getppid()))""",
    "ptrace": "def attack(w): return any(libc.ptrace(16, p, 0, 0) == 0 for p in (w['parent'], w['sibling']))",
    "open descriptors": """
def attack(w):
    def read(n):
        os.lseek(n, 0, 0)
        return b'swordfish' in os.read(n, 100)
    return opens(*[lambda n=n: read(n) for n in range(3, 64)])""",
    "TCP": "def attack(w): return opens(lambda: socket.create_connection(('127.0.0.1', w['tcp']), 1))",
    "TCP server": "def attack(w): return opens(lambda: socket.create_server(('127.0.0.1', 0)))",
    "UDP": "def attack(w): return opens(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', "
    "('127.0.0.1', w['udp'])))",
    "IPv6": "def attack(w): return opens(lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM))",
    "netlink": "def attack(w): return opens(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))",
    "Unix socket": "def attack(w): return opens(lambda: socket.socket(socket.AF_UNIX).connect(w['unix']))",
    "abstract Unix socket": "def attack(w): return opens(lambda: socket.socket(socket.AF_UNIX).connect(w['abstract']))",
    "names of hosts": "def attack(w): return opens(lambda: socket.getaddrinfo('localhost.localdomain', 80))",
    "disk": """
def attack(w):
    places = w['folder'], '/tmp', '/var/tmp', '/dev/shm', '.', '/'
    return opens(*[lambda p=p: open(p + '/filled', 'wb').write(bytes(1 << 20)) for p in places])""",
    "folders": "def attack(w): return opens(*[lambda p=p: os.mkdir(p + '/made') for p in (w['folder'], '/tmp', "
    "'/dev/shm', '.')])",
    "library": """
def attack(w):
    return opens(lambda: open(os.__file__, 'a'), lambda: os.chmod(os.__file__, 0o777), lambda: os.remove(w['secret']))""",  # noqa: E501
    "permissions": """
def attack(w):
    return opens(lambda: os.chmod(w['secret'], 0o777), lambda: os.truncate(w['secret'], 0), lambda: os.utime(w['secret']))""",  # noqa: E501
    "signals to the parent": "def attack(w): return opens(*[lambda p=p: os.kill(p, 0) for p in (w['parent'], "
    "os.getppid() or 1 << 20)])",
    "signals to a sibling": "def attack(w): return opens(lambda: os.kill(w['sibling'], signal.SIGKILL))",
    "signals to all": "def attack(w): return opens(lambda: os.kill(-1, 0), lambda: os.killpg(0, 0))",
    "signals by a descriptor's owner": """
def attack(w):
    import fcntl
    reader, writer = os.pipe()
    fcntl.fcntl(reader, fcntl.F_SETOWN, w['sibling'])
    fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    os.write(writer, b'x')
    return True""",
    "signals by pidfd": "def attack(w): return system(434, w['sibling'], 0) >= 0",
    "priorities and limits of "
    "others": "def attack(w): return opens(lambda: os.setpriority(os.PRIO_PROCESS, w['sibling'], 19)) or "
    "libc.prlimit(w['sibling'], 0, None, ctypes.create_string_buffer(16)) == 0",
    "own limits": "def attack(w):\n    import resource\n    try:\n        resource.setrlimit(resource.RLIMIT_AS, (1 "
    "<< 40, 1 << 40))\n"
    "    except ValueError:\n        return False\n    return True",
    "mount": "def attack(w): return libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0 or libc.umount2(b'/', 2) == 0",
    "unshare": "def attack(w): return any(libc.unshare(flags) == 0 for flags in (0x10000000, 0x20000, 0x40000000))",
    "chroot": "def attack(w): return opens(lambda: os.chroot('/'))",
    "root": "def attack(w): return opens(lambda: os.setresuid(0, 0, 0), lambda: os.setgid(0), lambda: "
    "os.setgroups([0]))",
    "keyring": "def attack(w): return libc.syscall(w['numbers']['add_key'], b'user', b'x', b'y', 1, -3) > 0 or "
    "system(w['numbers']['keyctl'], 0, -3, 1) > 0",
    "io_uring, bpf, perf, userfaultfd": """
def attack(w):
    block = ctypes.addressof(ctypes.create_string_buffer(256))
    return any(system(number, 1, block, 0, 0, 0) >= 0 for number in w['numbers']['kernel'])""",
    "memory that runs": """
def attack(w):
    file = system(w['numbers']['memfd_create'], b'x', 0)
    return file >= 0""",
    "shared memory": "def attack(w): return libc.shmget(0, 4096, 0o1777) >= 0 or libc.msgget(0, 0o1777) >= 0",
    "outlives its parent": "def attack(w): return libc.prctl(1, 0, 0, 0, 0) == 0",
    "dumpable": "def attack(w): return libc.prctl(4, 1, 0, 0, 0) == 0",
    "devices": """
def attack(w):
    names = 'mem kmem kmsg port tty tty0 ptmx fuse kvm nvidia0 nvidiactl nvidia-uvm dri/card0 loop-control shm/x sda vda'.split()
    return opens(*[lambda n=n, m=m: open('/dev/' + n, m) for n in names for m in ('rb', 'wb')])""",  # noqa: E501
    "clock and host name": "def attack(w): return opens(lambda: time.clock_settime(0, 1), lambda: "
    "socket.sethostname('x'))",
}
"""Attacks that end quickly."""
SLOW = {
    "memory at once": "def attack(w): return len(bytearray(3 << 30)) > 0",
    "memory by and by": "def attack(w):\n    held = []\n    while len(held) < 3000:\n        held.append(bytearray(1 "
    "<< 20))\n    return True",
    "threads": """
def attack(w):
    threading.stack_size(32768)
    for _ in range(20000):
        threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
    return True""",
    "sleep": "def attack(w):\n    time.sleep(1000)\n    return True",
    "spin": """
def attack(w):
    for number in range(1, 65):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
    while True:
        pass""",
    "flood of everything": """
def attack(w):
    for _ in range(100):
        for number in range(1, 64):
            try:
                os.write(number, bytes(1 << 20))
            except OSError:
                pass
    return False""",
    "large result": "def attack(w): return b'x' * (200 << 20)",
    "crash": "def attack(w): return ctypes.string_at(0)",
    "other calling convention": """
def attack(w):
    import mmap, platform
    if platform.machine() != 'x86_64':
        return False
    page = mmap.mmap(-1, 4096, prot=7)
    page.write(bytes.fromhex('b814000000cd80c3'))
    return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))() > 0""",
    "numbers of x32": """
def attack(w):
    import platform
    return platform.machine() == 'x86_64' and system(0x40000000 + 39) > 0""",
}
"""Attacks that a limit or the time limit stops."""
CONTROL = """
import asyncio, collections, contextlib, ctypes, dataclasses, datetime, decimal, fractions, functools, hashlib, heapq, io, itertools, json
import math, os, random, re, statistics, string, threading, time, typing, uuid
@dataclasses.dataclass
class Point:
    x: int
async def later(): await asyncio.sleep(0.001); return 3
def attack(world):
    with open(os.devnull, 'w') as nothing, contextlib.redirect_stdout(nothing):
        print('hello')
    print('x' * 100_000)
    done = []
    threads = [threading.Thread(target=done.append, args=(n,)) for n in range(4)]
    for each in threads: each.start()
    for each in threads: each.join()
    assert sorted(done) == [0, 1, 2, 3] and len(bytearray(200 << 20)) == 200 << 20
    assert asyncio.run(later()) == 3 and hashlib.sha256(b'x').hexdigest() and random.random() < 1 and uuid.uuid4() and datetime.datetime.now()
    return [Point(2).x, str(decimal.Decimal('1.5') * 2), sorted({3, 1, 2}), math.isclose(0.1 + 0.2, 0.3), max([1, 2])]
"""  # noqa: E501
CONTROL_GIVES = [2, "3.0", [1, 2, 3], True, 2]
NUMBERS = {
    "x86_64": {"clone": 56, "add_key": 248, "keyctl": 250, "memfd_create": 319, "kernel": [425, 321, 298, 323]},
    "aarch64": {"clone": 220, "add_key": 217, "keyctl": 219, "memfd_create": 279, "kernel": [425, 280, 241, 282]},
}


class World:
    """The targets outside of the sandbox; a context that removes all of them."""

    def __enter__(self) -> World:
        os.environ["TOKEN"] = SECRET
        self.folder = tempfile.mkdtemp()
        os.chmod(self.folder, 0o777)
        self.secret = os.path.join(self.folder, "secret")
        Path(self.secret).write_text(SECRET)
        self.opened = os.open(self.secret, os.O_RDONLY)
        os.set_inheritable(self.opened, True)
        self.memory = ctypes.create_string_buffer(SECRET.encode())
        self.tcp, self.udp = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.udp.setblocking(False)
        self.unix, self.abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        self.unix.bind(os.path.join(self.folder, "socket"))
        os.chmod(self.unix.getsockname(), 0o777)
        self.abstract.bind(f"\0attacks-{os.getpid()}")
        for each in (self.unix, self.abstract):
            each.listen()
        user: Any = {"user": 65534} if os.geteuid() == 0 else {}
        self.sibling = subprocess.Popen(["/bin/sleep", "1000"], **user)
        return self

    def as_dict(self) -> dict[str, Any]:
        package = str(Path(sys.modules[Confined.__module__].__file__ or "").parent)
        return {
            "secret": self.secret,
            "folder": self.folder,
            "parent": os.getpid(),
            "sibling": self.sibling.pid,
            "address": ctypes.addressof(self.memory),
            "tcp": self.tcp.getsockname()[1],
            "udp": self.udp.getsockname()[1],
            "unix": self.unix.getsockname(),
            "abstract": f"\0attacks-{os.getpid()}",
            "package": package,
            "numbers": NUMBERS[os.uname().machine],
        }

    def harm(self) -> list[str]:
        """Returns the targets that were harmed."""
        seen = {
            "the sibling was killed": self.sibling.poll() is not None,
            "a file was written": sorted(os.listdir(self.folder)) != ["secret", "socket"],
            "the secret was changed": not os.path.exists(self.secret) or Path(self.secret).read_text() != SECRET,
            "a datagram came": self._datagram(),
        }
        return [what for what, so in seen.items() if so]

    def _datagram(self) -> bool:
        try:
            return bool(self.udp.recv(1))
        except BlockingIOError:
            return False

    def __exit__(self, *_: object) -> None:
        self.sibling.send_signal(signal.SIGKILL)
        self.sibling.wait()
        os.close(self.opened)
        for each in (self.tcp, self.udp, self.unix, self.abstract):
            each.close()
        shutil.rmtree(self.folder)
        del os.environ["TOKEN"]


def run(level: Level, code: str, world: dict[str, Any], seconds: float = 1.5) -> str:
    """Returns the result of the `attack` of a text at a level: the value, the exception, or how the process ended."""
    solver, deadline = Confined("solver", level), time.monotonic() + 30
    try:
        solver.ready()
        deadline = time.monotonic() + seconds
        solver.send(encode({"prompt": "", "code": code, "entry": ""}), deadline)
        loaded = decode(solver.receive(deadline))
        if loaded != ["loaded"]:
            return f"not loaded: {loaded}"
        solver.send(encode(["name", "attack"]), deadline)
        solver.receive(deadline)
        solver.send(b"l4;" + encode("call") + b"o0;" + encode([world]) + encode({}), deadline)
        answer = decode(solver.receive(deadline), lambda number: f"object {number}")
        return repr(answer[1]) if answer[0] == "value" else f"raised {answer[1][0]}: {answer[2]}"
    except ChannelTimeout:
        return "ended by the clock"
    except ChannelClosed:
        return f"it {solver.end()}"
    except MessageTooLong:
        return "too long a message"
    except UnauthenticatedMessage:
        return "wrote to the stream of its results"
    finally:
        solver.end()


def run_attacks(level: Level, names: Iterable[str]) -> dict[str, str]:
    """Returns the attacks that succeeded or did harm at a level, with their results; and the control if it failed."""
    attacks, through = {**QUICK, **SLOW}, {}
    with World() as world:
        targets = world.as_dict()
        for name in names:
            came = run(level, HEAD + attacks[name], targets)
            if came not in ("False", "None") and not came.startswith(
                ("raised ", "ended by the clock", "it ", "too long", "wrote to")
            ):
                through[name] = came
            if harm := world.harm():
                through[name] = f"{came}; {', '.join(harm)}"
                break
        if (came := run(level, CONTROL, {}, 10.0)) != repr(CONTROL_GIVES):
            through["control"] = came
    return through


def main(names: list[str]) -> None:
    """Prints as JSON, for a test that runs it as another user: the levels, and the attacks that succeeded at them."""
    faults = {level: isolation.probe_level(level).fault for level in isolation.LEVELS}
    results = {level: fault or run_attacks(level, names or [*QUICK, *SLOW]) for level, fault in faults.items()}
    print(json.dumps({"user": os.geteuid(), "levels": results}))
