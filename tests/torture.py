# SPDX-License-Identifier: Apache-2.0
"""
Kill runs hundreds of times and compare what they end with; prints the table of tests/README.md.

    .venv/bin/python tests/torture.py --kills 210
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--kills", type=int, default=210, help="Over all cases.")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(root), str(root / "tests")]
    from harness import CASES, seeded, torture, write_photos
    from tqdm import tqdm

    rng = seeded()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        subprocess.run([sys.executable, root / "examples/make_tiny_sd3.py", folder / "tiny"], check=True)
        write_photos(folder / "photos")
        print("| case | kills | of them with a checkpoint to resume from | runs | bit-identical | same losses |")
        print("| --- | --- | --- | --- | --- | --- |")
        goal, total = -(-args.kills // len(CASES)), [0] * 5
        with tqdm(total=goal * len(CASES), unit="kill") as progress:
            for number, case in enumerate(CASES):
                row = [0] * 5
                while row[0] < goal:
                    place = folder / str(number)
                    outcome = torture(case, place, folder / "tiny", folder / "photos", min(5, goal - row[0]), rng)
                    subprocess.run(["rm", "-rf", place / "broken"], check=True)
                    values = (outcome.kills, outcome.resumed, 1, outcome.identical, outcome.same_losses)
                    row = [a + int(b) for a, b in zip(row, values, strict=True)]
                    progress.update(outcome.kills)
                tqdm.write(f"| {case} | " + " | ".join(map(str, row)) + " |", file=sys.stdout)
                total = [a + b for a, b in zip(total, row, strict=True)]
        print("| all | " + " | ".join(map(str, total)) + " |")
    sys.exit(0 if total[2] == total[3] == total[4] else 1)


if __name__ == "__main__":
    main()
