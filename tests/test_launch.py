"""How processes find each other: what Slurm sets, what is set by hand, and waiting for those who don't come."""

import socket
import threading

import pytest

from dino3d import launch
from dino3d.command_line import UserError
from dino3d.launch import Launch, first_host, meet, read_environment, tasks_of_nodes

BATCH = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STEP = BATCH | {
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_NODELIST": "gpu[003-005,7],login1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_JOB_NODELIST": "other[1-9]",
    "SLURM_TASKS_PER_NODE": "8",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("gpu[003-005,7],login1", "gpu003"),
        ("a[1-2]-b[3,4]", "a1-b3"),
        ("a[1,7]-b[03-04]x,c[1-2]", "a1-b03x"),
        ("login1,gpu[003-005]", "login1"),
        ("node-1", "node-1"),
        (" n[10] ", "n10"),
        ("r1-c[2,3].example.org,other", "r1-c2.example.org"),
        ("", ""),
    ],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    "text, tasks", [("2(x3),1", [2, 2, 2, 1]), ("4", [4]), ("1,3(x2)", [1, 3, 3]), ("", []), ("many", [])]
)
def test_tasks_of_nodes(text, tasks):
    assert tasks_of_nodes(text) == tasks


def test_a_task_of_srun():
    """Number, node and meeting point are the step's, not the job's and not where srun was called."""
    found, added = read_environment(STEP | {"SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "3"})
    assert found == Launch(6, 7, 0, 1, by_srun=True)
    assert added.pop("MASTER_ADDR") == "gpu003" and 20000 <= int(added.pop("MASTER_PORT")) < 32768
    assert added == {"RANK": "6", "WORLD_SIZE": "7", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert read_environment(STEP | {"SLURM_NODEID": "1"})[0].local_world_size == 2
    without = {name: value for name, value in STEP.items() if "_STEP_N" not in name and "_STEP_T" not in name}
    found, added = read_environment(without)
    assert (found.world_size, found.local_world_size, added["MASTER_ADDR"]) == (8, 8, "other1")
    by_hand = read_environment(STEP | {"MASTER_ADDR": "here", "MASTER_PORT": "1234"})[1]
    assert (by_hand["MASTER_ADDR"], by_hand["MASTER_PORT"]) == ("here", "1234")


def test_steps_of_a_job_meet_at_ports_of_their_own():
    ports = [read_environment(STEP | {"SLURM_STEP_ID": str(step)})[1]["MASTER_PORT"] for step in range(30)]
    jobs = [read_environment(STEP | {"SLURM_JOB_ID": str(4711 + job)})[1]["MASTER_PORT"] for job in range(1, 30)]
    assert len({*ports, *jobs}) == 59


@pytest.mark.parametrize("step", [None, "batch", "4294967291", "4294967290", "4294967294", ""])
def test_without_srun_one_process_with_a_note(step):
    """In a batch script, or in a shell of salloc, nobody starts the other tasks."""
    found, added = read_environment(BATCH | ({} if step is None else {"SLURM_STEP_ID": step}))
    assert found == Launch(notice=found.notice) and not added
    assert "8 tasks" in found.notice and "srun" in found.notice


def test_a_batch_script_that_says_its_tasks_by_node():
    """Slurm sets no SLURM_NTASKS then, and how many tasks a node has room for is no wish to use them."""
    nodes = {name: value for name, value in BATCH.items() if name != "SLURM_NTASKS"} | {"SLURM_JOB_NUM_NODES": "2"}
    assert "8 tasks" in read_environment(nodes | {"SLURM_NTASKS_PER_NODE": "4"})[0].notice
    assert "2 tasks" in read_environment(nodes)[0].notice  # one per node, as srun starts them
    assert read_environment(nodes | {"SLURM_JOB_NUM_NODES": "1", "SLURM_TASKS_PER_NODE": "64"}) == (Launch(), {})


def test_one_task_and_no_launcher():
    assert read_environment({}) == (Launch(), {})
    assert read_environment(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) == (Launch(), {})
    assert read_environment({"SLURM_NTASKS": "8"}) == (Launch(), {})  # salloc without a step


@pytest.mark.parametrize(
    "environment, says",
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "MASTER_PORT is not"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK is 2 and WORLD_SIZE is 2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK is 0 and WORLD_SIZE is 0"),
        (STEP | {"SLURM_PROCID": "7"}, "SLURM_PROCID is 7 and SLURM_STEP_NUM_TASKS is 7"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "1"}, "WORLD_SIZE is not set"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one'"),
        (STEP | {"SLURM_LOCALID": "?"}, "SLURM_LOCALID is '?'"),
        (STEP | {"SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""}, "SLURM_STEP_NODELIST is not set"),
    ],
)
def test_what_is_wrong_is_named(environment, says):
    with pytest.raises(UserError, match="^[^\n]*$") as error:
        read_environment(environment)
    assert says in str(error.value)


@pytest.fixture
def port(monkeypatch):
    for name, seconds in (("TOLD_AFTER", 0.2), ("LIMIT", 1.0), ("POLL", 0.05), ("GIVING_UP", 0.5)):
        monkeypatch.setattr(launch, name, seconds)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def meet_as(ranks, world_size, port):
    """[what `meet` raised or None] of some ranks of a run, each in a thread."""
    found, stores = {}, []

    def come(rank):
        try:
            stores.append(meet(rank, world_size, "localhost", port))  # rank 0's is the server of the others'
            found[rank] = None
        except UserError as error:
            found[rank] = error

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in ranks]


def test_all_come(port, capfd):
    assert meet_as([2, 1, 0], 3, port) == [None] * 3
    assert "error" not in capfd.readouterr().err


def test_one_does_not_come(port, capfd):
    """One line says what is waited for, and where; then all who came end together."""
    first, second = meet_as([0, 1], 3, port)
    assert str(first) == str(second) and str(first).startswith(f"1 of 3 processes have not come to localhost:{port}")
    assert first.everywhere and second.everywhere
    told = capfd.readouterr().err.splitlines()
    assert told == [f"waiting at localhost:{port} for 1 of 3 processes to join"]


def test_the_first_does_not_come(port, capfd):
    (error,) = meet_as([1], 2, port)
    assert str(error).startswith(f"rank 0 has not come to localhost:{port}") and not error.everywhere
    assert capfd.readouterr().err.splitlines() == [f"waiting at localhost:{port} for rank 0 to join"]


def test_a_meeting_point_that_is_taken_or_unknown(port):
    with socket.socket() as taken:
        taken.bind(("", int(port)))
        taken.listen()
        with pytest.raises(UserError, match=f"localhost:{port} .*in use.*: set MASTER_PORT"):
            meet(0, 2, "localhost", port)
    for address, number in (("nowhere.invalid", port), ("localhost", "many")):
        with pytest.raises(UserError, match="can't be found"):
            meet(1, 2, address, number)
