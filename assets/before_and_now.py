"""Training speed of several versions of this project on one GPU, by turns.

git worktree add ../before COMMIT
python assets/before_and_now.py ../before . -- --preset small --data CORPUS --steps 41

Flags behind -- are train.py's. Every version trains three times; the medians count. The last line
of output is the table as JSON.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

TURNS = 3


def train(version, flags):
    """The summary of a run of train.py in the folder of a version."""
    with TemporaryDirectory() as out:
        command = [sys.executable, "train.py", *flags, "--out", f"{out}/run"]
        subprocess.run(command, cwd=version, check=True, stdout=subprocess.DEVNULL)
        return json.loads(Path(out, "run/metrics.jsonl").read_text().splitlines()[-1])["final"]


def main():
    end = sys.argv.index("--")
    versions, flags = sys.argv[1:end], sys.argv[end + 1 :]
    runs = {version: [] for version in versions}
    for _ in range(TURNS):
        for version in versions:
            runs[version].append(train(version, flags))
    rows = []
    for version, finals in runs.items():
        row = {
            "version": version,
            "tokens/s": round(statistics.median(final["tokens_per_second"] for final in finals)),
            "all": [round(final["tokens_per_second"]) for final in finals],
            "MFU": round(statistics.median(final["mfu"] for final in finals), 3),
            "GiB": round(finals[0]["memory"] / 2**30, 1),
        }
        rows.append(row)
        print(row, flush=True)
    where = {"device": finals[0]["device"], "torch": finals[0]["torch"]}
    print(json.dumps({"flags": flags, **where, "rows": rows}))


main()
