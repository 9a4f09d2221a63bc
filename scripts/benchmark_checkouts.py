"""Speed of this checkout beside another one's, which `git worktree add ../old REV` makes; interleaved."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

HERE = Path(__file__).resolve().parents[1]
BACKBONES = {"T": "tiny", "S": "small", "B": "base", "L": "large"}
SIDE, N_CLS = 512, 150
WARM_UP = 2  # turns


class Worker:
    """A process that runs the models of one checkout.

    Args:
        root: the checkout.
        threads: of PyTorch.
    """

    def __init__(self, root: Path, threads: int) -> None:
        command = [sys.executable, str(HERE / "scripts/benchmark_checkouts.py"), "--serve", str(threads), str(root)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=root)

    def ask(self, **question: Any) -> Any:
        """Send a question, wait for the answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise click.ClickException(f"the process of {question} ended, see above")
        return json.loads(answer)


def serve(root: str, threads: int) -> None:
    """Answer questions about the models of a checkout: build one, time a pass."""
    sys.path.insert(0, root)
    import cv2
    import torch

    import patch
    from segm.data import create_dataset
    from segm.model.factory import create_segmenter

    torch.set_num_threads(threads)
    scenes = create_dataset("shapes", "val")
    images: Any = None
    logits: Any = None
    model: Any = None
    for line in sys.stdin:
        question = json.loads(line)
        with torch.inference_mode():
            if question["do"] == "build":
                torch.manual_seed(0)
                net = {"backbone": f"vit_{BACKBONES[question['size']]}_patch16_384", "image_size": SIDE, "n_cls": N_CLS}
                model = create_segmenter(net | {"decoder": {"name": "mask_transformer"}}).eval()
                pixels = [cv2.resize(scenes[i].image, (SIDE, SIDE)) for i in range(question["batch"])]
                images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
                if question["method"] != "pure":
                    patch.apply(model, question["method"], **question["options"])
                logits = getattr(model, "grid_logits", None) or model.grid_scores  # its name until 2026-11
                total = logits(images).double().abs().sum().item()
                counts = patch.reduction(model).counts.tolist() if question["method"] != "pure" else []
                print(json.dumps([total, counts]), flush=True)
            else:
                start = time.perf_counter()
                logits(images)
                print(json.dumps(time.perf_counter() - start), flush=True)


@click.command()
@click.argument("other", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--sizes", default="T,S", show_default=True, help="With commas between them, of T, S, B, L.")
@click.option("--threads", default=1, show_default=True, help="Of each process.")
@click.option("--turns", default=20, show_default=True, help="Timed passes of each; fewer of a batch.")
@click.option("--serve", "serving", type=int, hidden=True)
def main(other: Path, sizes: str, threads: int, turns: int, serving: int | None) -> None:
    """Compare token logits per second of this checkout with those of the checkout OTHER.

    Both run the same models on the same scenes, with options that keep about 690 and 410 of 1,024 tokens. The ratio is
    the median over turns in which one ran right after the other.
    """
    if serving is not None:
        serve(str(other), serving)
        return
    workers = [Worker(root, threads) for root in (other.resolve(), HERE)]
    click.echo("| Model, batch, method | tokens | other, ms | this, ms | speed, this ÷ other |")
    click.echo("| --- | --- | --- | --- | --- |")
    for size in sizes.split(","):
        for method, options, batch in cases(size):
            question = {"size": size, "method": method, "options": options, "batch": batch}
            (total, counts), (own_total, own_counts) = (worker.ask(do="build", **question) for worker in workers)
            if counts != own_counts or abs(total - own_total) > 1e-4 * total:
                raise click.ClickException(f"{size}, {method}: the checkouts do not compute the same")
            n_turns = WARM_UP + max(3, turns // batch)
            times = np.array([turn(workers, index) for index in tqdm(range(n_turns), leave=False)][WARM_UP:])
            old, new = 1000 * np.median(times, axis=0)
            kept = round(sum(counts) / len(counts)) if counts else "all"
            ratio = np.median(times[:, 0] / times[:, 1])
            click.echo(f"| {size}, {batch}, {method} | {kept} | {old:.1f} | {new:.1f} | {ratio:.3f} |")


def turn(workers: list[Worker], index: int) -> list[float]:
    """One pass of each, in alternating order; seconds, in the order of the workers."""
    order = (0, 1) if index % 2 else (1, 0)
    found = {number: workers[number].ask(do="time") for number in order}
    return [found[0], found[1]]


def cases(size: str) -> list[tuple[str, dict[str, Any], int]]:
    """(method, options, batch) of every row."""
    import torch

    from segm.data import create_dataset
    from segm.eval.comparison import settings_for
    from segm.model.factory import create_segmenter

    torch.manual_seed(0)
    net = {"backbone": f"vit_{BACKBONES[size]}_patch16_384", "image_size": SIDE, "n_cls": N_CLS}
    model = create_segmenter(net | {"decoder": {"name": "mask_transformer"}}).eval()
    scenes = create_dataset("shapes", "val", image_size=SIDE)
    images = scenes.view(scenes[0].image).unsqueeze(0)
    with torch.inference_mode():
        options = {method: settings_for(model, method, [images], 690) for method in ("graph", "algm", "tome")}
        fewer = settings_for(model, "graph", [images], 410)
    rows: list[tuple[str, dict[str, Any], int]] = [("pure", {}, 1)]
    return (
        rows
        + [(method, found, 1) for method, found in options.items()]
        + [
            ("graph", fewer, 1),
            ("graph", options["graph"], 8),
        ]
    )


if __name__ == "__main__":
    main()
