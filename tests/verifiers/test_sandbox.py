"""The process behind the SQL verifier: killed when it hangs, anew when it dies, gone with its parent, and no leaks."""

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from verifiers.sandbox import Sandbox, SandboxError
from verifiers.sql import SqlItem, SqlLimits, verify_batch

REPOSITORY = Path(__file__).resolve().parents[2]
GOLD = "SELECT name, id FROM staff ORDER BY id"
HANGS = "SELECT instr(printf('%.*c', 900000, 'a'), substr(printf('%.*c', 900000, 'a'), 1, 400000) || 'b')"

ENDLESS = "WITH RECURSIVE r(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM r) SELECT COUNT(*) FROM r"


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "a.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE staff (id INTEGER PRIMARY KEY, name TEXT)")
    connection.executemany("INSERT INTO staff VALUES (?, ?)", [(index, f"name {index}") for index in range(30)])
    connection.commit()
    connection.close()
    return path


@pytest.fixture
def sandbox():
    sandbox = Sandbox("verifiers.sql_worker")
    yield sandbox
    sandbox.close()


def request(database, query, time_s=30.0):
    limits = {"time_s": time_s, "max_steps": 10**15, "max_rows": 100}
    return {"query": query, "gold": GOLD, "databases": [str(database)], **limits}


def test_a_process_that_hangs_is_killed_and_the_others_are_answered(sandbox, database):
    requests = [request(database, query) for query in (GOLD, HANGS, GOLD, HANGS, GOLD)]
    [first] = sandbox.run(requests[:1], 30.0)
    pid = sandbox.pid
    start = time.monotonic()
    replies = sandbox.run(requests, 0.5)
    assert time.monotonic() - start < 30.0
    assert replies == [first, {"lost": "silent", "marks": 0}] * 2 + [first]
    assert first["exact_match"] == 1.0
    assert not psutil.pid_exists(pid) and sandbox.restarts == 3


def test_a_process_that_was_ended_from_outside_costs_nothing(sandbox, database):
    [first] = sandbox.run([request(database, GOLD)], 30.0)
    os.kill(sandbox.pid, signal.SIGKILL)
    assert sandbox.run([request(database, GOLD)] * 3, 30.0) == [first] * 3


def test_a_request_that_ends_the_process_twice_is_given_up_alone(sandbox, database):
    bad = {**request(database, GOLD), "gold": 3}  # no such request is ever made; the worker fails on it
    good = request(database, GOLD)
    replies = sandbox.run([good, bad, good], 30.0)
    assert replies[1]["lost"] == "ended" and replies[0] == replies[2] and replies[0]["exact_match"] == 1.0


def test_more_than_a_pipe_holds(sandbox, database):
    requests = [request(database, f"SELECT '{'x' * 5_000}{index}'") for index in range(300)]
    replies = sandbox.run(requests, 30.0)
    assert len(replies) == 300 and all(reply["execute"] == 1.0 for reply in replies)


def test_a_module_that_does_not_start_is_an_error():
    with pytest.raises(SandboxError, match="cannot be started: it ended with 1"):
        Sandbox("verifiers.no_such_module").run([{}], 1.0)


def test_the_process_has_its_limits_and_little_of_our_environment(sandbox, database, monkeypatch):
    monkeypatch.setenv("SOME_SECRET", "x")
    sandbox.run([request(database, GOLD)], 30.0)
    process = psutil.Process(sandbox.pid)
    assert "SOME_SECRET" not in process.environ()
    limits = Path(f"/proc/{process.pid}/limits")
    if limits.exists():
        lines = [line.split() for line in limits.read_text().splitlines()]
        assert ["Max", "file", "size", "0", "0", "bytes"] in lines
        assert ["Max", "core", "file", "size", "0", "0", "bytes"] in lines


def test_the_process_ends_with_a_killed_parent_even_at_work(database):
    program = f"""
        import sys
        from verifiers.sandbox import Sandbox
        sandbox = Sandbox("verifiers.sql_worker")
        request = {request(database, GOLD)!r}
        sandbox.run([request], 60)
        print(sandbox.pid, flush=True)
        sandbox.run([{{**request, "query": {ENDLESS!r}}}], 60)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, cwd=REPOSITORY, text=True
    )
    try:
        child = psutil.Process(int(parent.stdout.readline()))
        busy = child.cpu_times().user + 0.1
        while child.cpu_times().user < busy:  # it is at the query
            time.sleep(0.01)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    # Reaped by whoever adopts it; a zombie has ended too.
    deadline = time.monotonic() + 20.0  # the query would go on for 30 s
    while psutil.pid_exists(child.pid) and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not psutil.pid_exists(child.pid) or child.status() == psutil.STATUS_ZOMBIE


def test_a_forked_process_starts_its_own(sandbox, database):
    [first] = sandbox.run([request(database, GOLD)], 30.0)
    pid = sandbox.pid
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if sandbox.run([request(database, GOLD)], 30.0) == [first] and sandbox.pid != pid else 2
            sandbox.close()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert sandbox.run([request(database, GOLD)], 30.0) == [first] and sandbox.pid == pid


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("rest", ["ORDER BY t", "LIMIT 90"])  # in SQLite's hands, in ours
def test_hostile_results_take_little_memory(sandbox, database, rest):
    query = ENDLESS.replace("SELECT COUNT(*) FROM r", f"SELECT printf('%.*c', 900000, 'a') || i AS t FROM r {rest}")
    [reply] = sandbox.run([request(database, query)], 60.0)
    assert reply["execute"] == 0.0 and ("memory" in reply["reason"] or "characters" in reply["reason"])
    status = dict(line.split(":", 1) for line in Path(f"/proc/{sandbox.pid}/status").read_text().splitlines())
    assert int(status["VmHWM"].split()[0]) < 450 * 1024


def test_a_write_ahead_log_is_neither_made_nor_read(sandbox, database):
    connection = sqlite3.connect(database)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.close()
    [reply] = sandbox.run([request(database, GOLD)], 30.0)
    assert reply["exact_match"] == 1.0
    assert os.listdir(database.parent) == [database.name]


@pytest.mark.slow
def test_hostile_and_plain_verifications_leak_nothing_over_10000(database):
    from verifiers import sql

    limits = SqlLimits(time_s=1.0, max_steps=20_000, max_rows=100)
    endless = "WITH RECURSIVE r(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM r) SELECT "
    queries = [
        GOLD,
        "SELECT nam FROM staff",
        "no query",
        endless + "COUNT(*) FROM r",
        "SELECT (",
        "SELECT 1; DROP TABLE t",
    ]
    queries += ["SELECT replace(printf('%.*c', 90000, 'a'), 'a', 'bb')", "SELECT a.id FROM staff a, staff b"]
    items = [SqlItem(queries[index % len(queries)], GOLD, [database]) for index in range(1_000)]
    ours = psutil.Process()

    def used():
        child = psutil.Process(sql._sandbox().pid)
        files = {entry.path for entry in (*ours.open_files(), *child.open_files())}
        return len(ours.children(recursive=True)), ours.num_fds(), child.num_fds(), files, child.memory_info().rss

    first = verify_batch(items, limits=limits)
    before, pid = used(), sql._sandbox().pid
    for _ in range(10):
        assert verify_batch(items, limits=limits) == first
    after = used()
    assert sql._sandbox().pid == pid
    assert after[:4] == before[:4]
    assert after[4] - before[4] < 16 * 2**20, "the sandbox grows"
    assert os.listdir(database.parent) == [database.name]
