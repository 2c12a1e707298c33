"""How fast is a data set read and checked, on one core, and how much memory does it take?

    python -m bench.reading [--megabytes 200] [--row-bytes 1000]

Writes a file of OpenAI messages (short words, line breaks, some quotes and letters beyond ASCII), looks at
it as an upload does, and prints megabytes a second and by how much the process grew at its peak. A plain
`json.loads` of every line stands beside it.
"""

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

from core.ml.formats import validate

WORDS = "the of and a to in he have it that for they I with as not on she at by this we you do but from or which one "
WORDS += 'would all will there say who make when can more if no man out other so what time up go "quoted" café naïve 東京'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--row-bytes", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        rows = write(path, options.megabytes * 10**6, options.row_bytes)
        size = path.stat().st_size / 1e6
        began = time.process_time()
        with path.open("rb") as file:
            for line in file:
                json.loads(line)
        plain = time.process_time() - began
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        began = time.process_time()
        with path.open("rb") as file:
            report = validate.inspect(file, filename=path.name)
        seconds = time.process_time() - began
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    if report.rows != rows or report.error_count:
        raise SystemExit(f"{report.rows} of {rows} rows, {report.error_count} errors")
    print(
        f"{size:.0f} MB, {rows} rows of {options.row_bytes} bytes: checked with {size / seconds:.0f} MB/s of one core, "
        f"json.loads alone {size / plain:.0f} MB/s; the process grew by {grown:.0f} MB"
    )


def write(path: Path, size: int, row_bytes: int) -> int:
    """Write rows until the file has `size` bytes; how many."""
    chance = random.Random(1)
    words = WORDS.split()
    text = " ".join(chance.choice(words) + ("\n" if chance.random() < 0.03 else "") for _ in range(20_000))
    count = 0
    with path.open("w") as file:
        while size > 0:
            parts = []
            for _ in range(2):
                start = chance.randrange(len(text) - row_bytes)
                parts.append(text[start : start + row_bytes // 2 - 50])
            turns = [{"role": "user", "content": parts[0]}, {"role": "assistant", "content": parts[1]}]
            size -= file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
            count += 1
    return count


if __name__ == "__main__":
    main()
