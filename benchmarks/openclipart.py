"""A real set goes through the whole preparation: Debian's openclipart, drawings of many hands with links and monsters.

``python benchmarks/openclipart.py WORK [--openclipart /usr/share/openclipart]``, after
``apt-get install openclipart-png openclipart-svg``

Every PNG of the package becomes a post, with the keywords of its SVG; ``filters.min_side`` is 256, buckets and the tiny
base are the demo's. Most posts are prepared first, then all; the same again without a change; all in a run that is
killed by SIGKILL and resumed by two processes; and all at once by two. Prints one table. The script fails unless
the three sets of all posts have one fingerprint, adding posts left every older shard as it was and encoded as many
samples as it added, and every set's bytes are as written. The sets stay in WORK/shards_* to be looked at.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))

from make_demo_data import describe_drawing, read_metadata  # noqa: E402

from trainer.config.load import load_config  # noqa: E402
from trainer.core.files import sha256_file  # noqa: E402
from trainer.data.index import open_index  # noqa: E402
from trainer.prepare.prepare import prepare  # noqa: E402
from trainer.prepare.verify import verify_shards  # noqa: E402

ADDED_EVERY = 20  # every so many posts one is held back, and added later
KILL_AT = 4  # shards that are complete when the run is killed
CONFIGS = ("configs/stage1_feature_alignment.yaml", "configs/demo.yaml")
COLUMNS = ("processes", "inputs", "samples", "encoded", "set aside", "filters.min_side", "duplicates", "s", "images/s")


@dataclass(frozen=True)
class Bench:
    """Where everything lies."""

    openclipart: Path
    work: Path

    def words(self, name: str, posts: Sequence[str]) -> list[str]:
        """``key=value`` words of the preparation of some posts files into a set of this name."""
        return [
            f"model.pretrained={self.work / 'base'}", f"data.posts=[{','.join(str(self.work / n) for n in posts)}]",
            f"data.images={self.openclipart / 'png'}", f"data.shards={self.shards(name)}", "filters.min_side=256",
            "data.samples_per_shard=200", "data.decode_processes=1", "schedule.max_steps=1",
        ]  # fmt: skip

    def shards(self, name: str) -> Path:
        return self.work / f"shards_{name}"


def make_posts(openclipart: Path) -> Iterator[dict[str, Any]]:
    """A post for every PNG, links and broken ones included, numbered from 1 in order of the paths."""
    for number, png in enumerate(sorted((openclipart / "png").rglob("*.png")), start=1):
        relative = png.relative_to(openclipart / "png")
        svg = relative.with_suffix(".svg")
        tags = describe_drawing(read_metadata(openclipart / "svg" / svg), str(svg))
        yield {"id": number, "file": str(relative), "file_ext": "png", **tags}


def write_posts(bench: Bench) -> int:
    """posts.jsonl, and more.jsonl with those that are added later; how many there are."""
    posts = list(make_posts(bench.openclipart))
    for name, kept in (("posts", [p for p in posts if p["id"] % ADDED_EVERY]),
                       ("more", [p for p in posts if not p["id"] % ADDED_EVERY])):  # fmt: skip
        lines = [json.dumps(post, ensure_ascii=False) + "\n" for post in kept]
        (bench.work / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(posts)


def start(words: list[str], processes: int) -> subprocess.Popen[str]:
    """This script as the worker of one preparation, in processes of its own."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*launcher, str(ROOT / "benchmarks" / "openclipart.py"), "--worker", *words]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, text=True, stdout=subprocess.PIPE)


def work(words: list[str]) -> None:
    """One preparation; says what it did and how long it took, imports excluded, as JSON."""
    config = load_config([ROOT / name for name in CONFIGS], words)
    began = time.perf_counter()
    summary = prepare(config)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(asdict(summary) | {"folder": str(summary.folder), "seconds": time.perf_counter() - began}))


def run(words: list[str], processes: int = 1) -> dict[str, Any]:
    """One preparation to its end."""
    process = start(words, processes)
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the preparation of {words} failed")
    return json.loads(said.splitlines()[-1])


def run_and_kill(bench: Bench, words: list[str], name: str) -> int:
    """One preparation, killed as soon as some shards are complete; how many there were."""
    process = start(words, 1)
    rows = Path(f"{bench.shards(name)}.unfinished") / "rows"
    while len(list(rows.glob("*.arrow"))) < KILL_AT:
        if process.poll() is not None:
            raise SystemExit("the preparation ended before it could be killed")
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return len(list(rows.glob("*.arrow")))


def format_line(name: str, processes: int, done: dict[str, Any], opened: int) -> str:
    """A line of the table; ``opened`` images were looked at."""
    manifest = open_index(done["folder"]).manifest
    numbers = [
        processes, manifest["counts"]["inputs"], done["samples"], done["encoded"], sum(done["set_aside"].values()),
        done["filtered"].get("min_side", 0), done["notes"].get("duplicate", 0), f"{done['seconds']:.1f}",
        f"{opened / done['seconds']:.0f}" if opened else "-",
    ]  # fmt: skip
    return f"| {name} | {' | '.join(str(number) for number in numbers)} |"


def check(claim: str, holds: bool) -> None:
    if not holds:
        raise SystemExit(f"FAILED: {claim}")
    print(f"checked: {claim}", flush=True)


def measure(bench: Bench) -> None:
    """All preparations, the table and the checks."""
    total = write_posts(bench)
    first, everything = ["posts.jsonl"], ["posts.jsonl", "more.jsonl"]
    print(f"| | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")

    def show(name: str, processes: int, done: dict[str, Any], opened: int) -> dict[str, Any]:
        print(format_line(name, processes, done, opened), flush=True)
        return done

    before = show("most posts", 1, run(bench.words("added", first)), total - total // ADDED_EVERY)
    tars = {path.name: sha256_file(path) for path in bench.shards("added").glob("*.tar")}
    words = bench.words("added", everything)
    added = show("all posts: some added", 1, run(words), total - before["samples"])
    again = show("the same once more", 1, run(words), 0)
    words = bench.words("killed", everything)
    killed = run_and_kill(bench, words, "killed")
    show(f"killed at {killed} shards, resumed", 2, run(words, 2), total - 200 * killed)
    show("all posts at once", 2, run(bench.words("whole", everything), 2), total)
    names = ("added", "killed", "whole")
    prints = [open_index(bench.shards(name)).fingerprint for name in names]
    check(f"one fingerprint: {prints[0][:16]}", len(set(prints)) == 1)
    check("adding encodes what is new", added["encoded"] == added["samples"] - before["samples"] > 0)
    kept = {name: sha256_file(bench.shards("added") / name) for name in tars}
    check("and leaves the older shards as they are", kept == tars)
    check("nothing is encoded without a change", again["encoded"] == 0)
    for name in names:
        check(str(verify_shards(bench.shards(name))), True)
    print("set aside: " + json.dumps(added["set_aside"]))


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description="Debian's openclipart through the whole preparation.")
    parser.add_argument("work", type=Path, help="an empty or new folder, to be deleted afterwards")
    parser.add_argument("--openclipart", type=Path, default=Path("/usr/share/openclipart"))
    arguments = parser.parse_args()
    bench = Bench(arguments.openclipart.absolute(), arguments.work.absolute())
    if not all((bench.openclipart / part).is_dir() for part in ("png", "svg")):
        parser.error(f"no drawings in {bench.openclipart}: install Debian's openclipart-png and openclipart-svg")
    bench.work.mkdir(parents=True, exist_ok=True)
    if any(bench.work.iterdir()):
        parser.error(f"{bench.work} is not empty")
    subprocess.run([sys.executable, "scripts/make_tiny_base.py", str(bench.work / "base")], cwd=ROOT, check=True)
    measure(bench)


if __name__ == "__main__":
    main()
