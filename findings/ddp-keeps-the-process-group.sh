#!/usr/bin/env bash
# PyTorch 2.13.0: destroy_process_group() does not end a gloo group's threads once DistributedDataParallel has been used,
# unless torch.distributed.nn was imported before the group was made.
# DDP's constructor imports torch.distributed.nn.functional, whose functions have the default group of that moment as a
# default argument, for as long as the process lives. A thread of the group that is left when the interpreter ends can abort
# a process that has done all its work.
# Seen: "late: 3 threads of gloo after destroy_process_group", "early: 0 threads ...". Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/probe.py" <<'PY'
import gc, os, pathlib, sys
import torch
import torch.distributed as dist
if sys.argv[1] == "early":
    import torch.distributed.nn
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=0, world_size=1)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
model(torch.rand(1, 2)).sum().backward()
del model
gc.collect()
dist.destroy_process_group()
gc.collect()
names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
print(sum("gloo" in name for name in names))
PY
for when in late early; do
    count=$(cd "$folder" && OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo "$folder/venv/bin/python" probe.py "$when" "$folder/store-$when")
    echo "$when: $count threads of gloo after destroy_process_group"
    if [ "$when" = late ]; then [ "$count" -gt 0 ]; else [ "$count" -eq 0 ]; fi
done
