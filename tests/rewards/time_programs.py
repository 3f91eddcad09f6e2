"""Programs for the task `solve(n)`, twice a number: right ones that compute for a while, and wrong ones that use up
time in every way that the sandbox allows."""

from __future__ import annotations

TASK = {"code": "def solve(n):\n    return 2 * n", "test_list": ["assert solve(7) == 14", "assert solve(-3) == -6"]}
RIGHT = """
import time
def solve(n):
    end = time.process_time() + 0.15
    while time.process_time() < end: work()
    return 2 * n
"""
WRONG = "def solve(n):\n    work()\n    return 2 * n + 1\n"


def right(work: str) -> str:
    """Returns a right program that computes for 0.15 s of CPU time in each call; `work` is the text of a function."""
    return f"{work}\n{RIGHT}"


def wrong(work: str) -> str:
    """Returns a wrong program."""
    return f"{work}\n{WRONG}"


HONEST_WORK = {
    "loop": "def work():\n    x = 0\n    for i in range(900_000): x += i",
    "while": "def work():\n    i = 0\n    while i < 800_000: i += 1",
    "comprehension": "def work(): return [i * i for i in range(800_000)]",
    "set": "def work(): return {i % 1000 for i in range(900_000)}",
    "dict": "def work(): return {i: str(i) for i in range(200_000)}",
    "sort": "def work(): return sorted((i * 7919) % 100_003 for i in range(200_000))",
    "bubble sort": """
def work():
    x = [(i * 37) % 101 for i in range(500)]
    for i in range(len(x)):
        for j in range(len(x) - 1):
            if x[j] > x[j + 1]: x[j], x[j + 1] = x[j + 1], x[j]""",
    "merge sort": """
def merge_sort(x):
    if len(x) < 2: return x
    a, b, out = merge_sort(x[: len(x) // 2]), merge_sort(x[len(x) // 2 :]), []
    i = j = 0
    while i < len(a) and j < len(b):
        if a[i] <= b[j]: out.append(a[i]); i += 1
        else: out.append(b[j]); j += 1
    return out + a[i:] + b[j:]
def work(): return merge_sort([(i * 7919) % 20_011 for i in range(15_000)])""",
    "quick sort": """
def quick(x):
    if len(x) < 2: return x
    return quick([y for y in x[1:] if y < x[0]]) + [x[0]] + quick([y for y in x[1:] if y >= x[0]])
def work(): return quick([(i * 7919) % 50_021 for i in range(20_000)])""",
    "heap": """
import heapq
def work():
    heap = []
    for i in range(80_000): heapq.heappush(heap, (i * 7919) % 100_003)
    while heap: heapq.heappop(heap)""",
    "deque": """
from collections import deque
def work():
    queue = deque(range(1000))
    for _ in range(500_000): queue.append(queue.popleft())""",
    "counter": "from collections import Counter\ndef work(): return Counter(str(i)[-1] for i in range(300_000))",
    "recursion": "def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)\ndef work(): return fib(24)",
    "deep recursion": """
import sys
sys.setrecursionlimit(5000)
def depth(n): return 0 if n == 0 else 1 + depth(n - 1)
def work():
    for _ in range(150): depth(3000)""",
    "lru_cache": """
from functools import lru_cache
def work():
    @lru_cache(None)
    def ways(n, k): return 1 if n == 0 else 0 if n < 0 or k == 0 else ways(n - k, k) + ways(n, k - 1)
    return ways(300, 300)""",
    "sieve": """
def work():
    flags = [True] * 600_000
    for i in range(2, 775):
        if flags[i]:
            for j in range(i * i, 600_000, i): flags[j] = False""",
    "trial division": "def work(): return [n for n in range(2, 9000) if all(n % d for d in range(2, int(n**0.5) + 1))]",
    "collatz": """
def work():
    for n in range(1, 6000):
        while n > 1: n = n // 2 if n % 2 == 0 else 3 * n + 1""",
    "large integers": "def work(): return sum(len(str(7**i)) for i in range(1, 1500, 3))",
    "decimals": """
from decimal import Decimal, getcontext
def work():
    getcontext().prec = 60
    x = Decimal(2)
    for _ in range(40_000): x = (x + 2 / x) / 2""",
    "fractions": """
from fractions import Fraction
def work(): return sum(Fraction(1, i) for i in range(1, 900))""",
    "floats": "import math\ndef work(): return sum(math.sin(i) * math.sqrt(i) for i in range(600_000))",
    "complex": """
def work():
    for row in range(60):
        for column in range(60):
            z, c = 0j, complex(column / 30 - 1.5, row / 30 - 1)
            for _ in range(60):
                z = z * z + c
                if abs(z) > 2: break""",
    "matrix": """
def work():
    n = 70
    a = [[i * j % 7 for j in range(n)] for i in range(n)]
    return [[sum(a[i][k] * a[k][j] for k in range(n)) for j in range(n)] for i in range(n)]""",
    "edit distance": """
def work():
    a, b = "kitten" * 60, "sitting" * 60
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        new = [i + 1]
        for j, y in enumerate(b): new.append(min(row[j] + (x != y), row[j + 1] + 1, new[-1] + 1))
        row = new""",
    "knapsack": """
def work():
    best = [0] * 5001
    for weight in range(1, 120):
        for room in range(5000, weight - 1, -1): best[room] = max(best[room], best[room - weight] + weight % 13)""",
    "queens": """
def place(n, row, columns, up, down):
    if row == n: return 1
    return sum(place(n, row + 1, columns | {c}, up | {row + c}, down | {row - c}) for c in range(n)
               if c not in columns and row + c not in up and row - c not in down)
def work(): return place(8, 0, frozenset(), frozenset(), frozenset())""",
    "permutations": """
from itertools import permutations
def work(): return sum(p[0] < p[-1] for p in permutations(range(9)))""",
    "combinations": """
from itertools import combinations
def work(): return sum(sum(c) % 2 for c in combinations(range(24), 5))""",
    "product": """
from itertools import product
def work(): return sum(1 for p in product(range(8), repeat=6) if sum(p) == 20)""",
    "graph": """
import heapq
def work():
    far, heap = {}, [(0, 0)]
    while heap:
        d, node = heapq.heappop(heap)
        if node in far: continue
        far[node] = d
        for step in (1, 7, 31):
            if node + step < 40_000: heapq.heappush(heap, (d + step % 5 + 1, node + step))""",
    "union find": """
def work():
    parent = list(range(100_000))
    def find(x):
        while parent[x] != x: parent[x] = parent[parent[x]]; x = parent[x]
        return x
    for i in range(99_000): parent[find(i)] = find((i * 7919) % 100_000)""",
    "life": """
def work():
    cells = {(i, i * i % 40) for i in range(60)}
    for _ in range(12):
        near = {}
        for x, y in cells:
            for dx in (-1, 0, 1):
                for dy in (-1, 0, 1): near[x + dx, y + dy] = near.get((x + dx, y + dy), 0) + 1
        cells = {c for c, n in near.items() if n in (3, 4)}""",
    "strings": "def work(): return ''.join(chr(97 + i % 26) for i in range(500_000)).count('abc')",
    "split": "def work(): return sum(map(int, ' '.join(map(str, range(300_000))).split()))",
    "regular expression": """
import re
def work(): return len(re.findall(r"(\\w+)@(\\w+)", "someone@example nobody " * 20_000))""",
    "json": "import json\ndef work(): return json.loads(json.dumps([{'a': i, 'b': [i] * 3} for i in range(40_000)]))",
    "hash": """
import hashlib
def work():
    for i in range(90_000): hashlib.sha256(str(i).encode()).hexdigest()""",
    "zlib": "import zlib\ndef work(): return zlib.decompress(zlib.compress(bytes(range(256)) * 12_000, 9))",
    "random numbers": "import random\ndef work(): return sum(random.Random(5).random() for _ in range(60))",
    "statistics": "import statistics\ndef work(): return statistics.stdev([i % 17 for i in range(40_000)])",
    "dates": """
from datetime import date, timedelta
def work():
    day = date(1900, 1, 1)
    for _ in range(70_000): day += timedelta(days=1); day.isoformat()""",
    "memory": "def work():\n    x = bytearray(150_000_000)\n    for i in range(0, len(x), 4096): x[i] = 1",
    "objects": """
from dataclasses import dataclass
@dataclass
class Node:
    value: int
    left: "Node | None" = None
    right: "Node | None" = None
def tree(n): return Node(n, tree(n - 1), tree(n - 1)) if n else Node(0)
def work(): return tree(16)""",
    "exceptions": """
def work():
    for i in range(200_000):
        try: raise ValueError(i)
        except ValueError: pass""",
    "generators": """
def naturals():
    n = 0
    while True: yield n; n += 1
def work():
    for n in (x * 2 for x in naturals() if x % 3):
        if n > 900_000: return""",
    "sleeps a little": "import time\ndef work():\n    for _ in range(10): time.sleep(0.002); sum(range(300_000))",
    "threads": """
import threading
def work():
    threads = [threading.Thread(target=sum, args=(range(900_000),)) for _ in range(6)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()""",
    "thread pool": """
from concurrent.futures import ThreadPoolExecutor
import hashlib
def work():
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda i: hashlib.sha256(bytes(4_000_000)).digest(), range(12)))""",
    "queue of threads": """
import queue, threading
def work():
    there, back = queue.Queue(), queue.Queue()
    def echo():
        while (x := there.get()) is not None: back.put(x + 1)
    thread = threading.Thread(target=echo)
    thread.start()
    for i in range(4000): there.put(i); back.get()
    there.put(None)
    thread.join()""",
}
HONEST = {name: right(text) for name, text in HONEST_WORK.items()}

THREADS = """
import hashlib, threading, time
threading.stack_size(65536)
block = bytes(200_000)
def start(count, run):
    for _ in range(count):
        try: threading.Thread(target=run, daemon=True).start()
        except RuntimeError: pass
def spin(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end: hashlib.sha256(block).digest()
"""
SPIN_THEN_SLEEP = THREADS + "def work():\n    start({}, lambda: (spin({}), time.sleep(60)))\n    time.sleep(60)"
CHEAT_WORK = {
    "loop": "def work():\n    while True: pass",
    "loop while it is loaded": "while True: pass",
    "loop of sums": "def work():\n    while True: sum(range(1000))",
    "loop in C": "def work(): return sum(range(10**12))",
    "large power": "def work(): return 7 ** (10 ** 9)",
    "large factorial": "import math\ndef work(): return math.factorial(10**7)",
    "regular expression": "import re\ndef work(): return re.match('(a+)+b', 'a' * 60)",
    "infinite iterator": "import itertools\ndef work(): return sum(1 for _ in itertools.count())",
    "infinite list": "def work(): return [0 for _ in iter(int, 1)]",
    "exponential recursion": "def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)\ndef work(): return fib(60)",
    "sleep": "import time\ndef work(): time.sleep(1000)",
    "sleep while it is loaded": "import time\ntime.sleep(1000)",
    "nearly all its time while it is loaded": "import time\ntime.sleep(0.57)\ndef work(): pass",
    "nearly all its time in the first call": "import time\ndef work(): time.sleep(0.57)",
    "many short sleeps": "import time\ndef work():\n    while True: time.sleep(0.001)",
    "very short sleeps": "import time\ndef work():\n    while True: time.sleep(1e-6)",
    "half asleep": "import time\ndef work():\n    while True: sum(range(200_000)); time.sleep(0.004)",
    "waits for a lock": "import threading\ndef work():\n    lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "waits for an event": "import threading\ndef work(): threading.Event().wait()",
    "waits for a signal": "import signal\ndef work(): signal.pause()",
    "waits for a pipe": "import os\ndef work(): os.read(os.pipe()[0], 1)",
    "waits for its input": "import select\ndef work(): select.select([], [], [])",
    "joins itself": """
import threading
def work():
    a = threading.Thread(target=lambda: threading.Event().wait(), daemon=True)
    a.start()
    a.join()""",
    "14 threads, then sleep": SPIN_THEN_SLEEP.format(14, 0.2),
    "30 threads, then sleep": SPIN_THEN_SLEEP.format(30, 0.1),
    "200 threads, then sleep": SPIN_THEN_SLEEP.format(200, 0.1),
    "threads without end": THREADS + "def work():\n    start(14, lambda: spin(60))\n    spin(60)",
    "200 threads without end": THREADS + "def work():\n    start(200, lambda: spin(60))\n    time.sleep(60)",
    "threads while it is loaded": THREADS + "start(300, lambda: spin(60))\ndef work(): time.sleep(60)",
    "threads that go on behind a call": THREADS + "def work(): start(60, lambda: spin(60))\nwork()\nspin(60)",
    "threads in bursts": THREADS
    + """
def burst():
    while True: spin(0.002); time.sleep(0.05 - time.monotonic() % 0.05)
def work():
    start(100, burst)
    time.sleep(60)""",
    "threads that start threads": THREADS
    + """
def breed():
    while True:
        try: threading.Thread(target=breed, daemon=True).start()
        except RuntimeError: spin(60)
def work(): breed()""",
    "threads of Python": "import threading\ndef run():\n    while True: pass\n"
    "def work():\n    for _ in range(20): threading.Thread(target=run, daemon=True).start()\n    run()",
    "two threads that wake each other": """
import threading
def work():
    a, b = threading.Semaphore(1), threading.Semaphore(0)
    def other():
        while True: b.acquire(); a.release()
    threading.Thread(target=other, daemon=True).start()
    while True: a.acquire(); b.release()""",
    "two threads and pipes": """
import os, threading
def work():
    first, second = os.pipe(), os.pipe()
    def other():
        while True: os.write(second[1], os.read(first[0], 1))
    threading.Thread(target=other, daemon=True).start()
    while True: os.write(first[1], b"x"); os.read(second[0], 1)""",
    "gives up the processor": "import os\ndef work():\n    while True: os.sched_yield()",
    "memory without end": "def work():\n    x = []\n    while True: x.append(bytearray(1 << 20))",
    "memory again and again": "def work():\n    while True: bytearray(200 << 20)",
    "fork": "import os\ndef work():\n    while True: os.fork()",
    "fork, refused, then sleep": """
import os, time
def work():
    try: os.fork()
    except OSError: time.sleep(60)""",
    "subprocess": "import subprocess\ndef work(): subprocess.run(['sleep', '60'])",
    "multiprocessing": "import multiprocessing\ndef work(): multiprocessing.Pool(8).map(abs, range(8))",
    "nice": """
import os
def work():
    try: os.nice(19)
    except OSError: pass
    while True: pass""",
    "affinity": """
import os
def work():
    try: os.sched_setaffinity(0, {0})
    except OSError: pass
    while True: pass""",
    "real time": """
import os
def work():
    for policy in (os.SCHED_IDLE, os.SCHED_BATCH, os.SCHED_RR):
        try: os.sched_setscheduler(0, policy, os.sched_param(0))
        except OSError: pass
    while True: pass""",
    "stops itself": "import os, signal\ndef work():\n    os.kill(os.getpid(), signal.SIGSTOP)\n    while True: pass",
    "ignores signals": """
import signal
def work():
    for number in range(1, 32):
        try: signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError): pass
    while True: pass""",
    "alarms without end": """
import signal
def work():
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
    while True: signal.pause()""",
    "closes everything, then sleeps": "import os, time\ndef work():\n    os.closerange(0, 64)\n    time.sleep(60)",
    "writes a little, again and again": """
import os, time
def work():
    while True:
        for number in range(3, 64):
            try: os.write(number, b"\\0")
            except OSError: pass
        time.sleep(0.01)""",
    "an answer without end": "def solve(n):\n    while True: yield n\n",
    "a nested answer": "def solve(n):\n    x = []\n    for _ in range(900): x = [x, n]\n    return x\n",
    "an answer of many zeros": "def solve(n): return [0] * 900_000\n",
    "keys of one hash": "def solve(n): return {i * (2**61 - 1): 0 for i in range(60_000)}\n",
    "a name that looks like a state": """
import ctypes, time
def work():
    ctypes.CDLL(None).prctl(15, b") R 1 1 (", 0, 0, 0)
    time.sleep(60)""",
}
"""Each takes what it can, or waits for what never comes; where it ends at all its result is wrong."""
CHEATS = {name: text if "def solve" in text else wrong(text) for name, text in CHEAT_WORK.items()}
