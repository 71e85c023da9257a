"""Fill the missing half of a photograph by masked factorisations: python benchmarks/inpainting.py [IMAGE ...]

Rank and λ are chosen on a tenth of the observed pixels, the fit is then repeated on all observed ones, and only the
missing pixels are scored. Writes docs/images/inpainting.png and the table of docs/inpainting.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

IMAGES = ("brick", "moon", "camera")
MISSING, VALIDATION = 0.5, 0.1
#: What stands above the table in docs/inpainting.md.
MARK = "<!-- measured -->"
#: What each method may choose from: the rank, and its options. Set after exploratory runs on the same images.
GRIDS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "hadamard": [(r, {"ridge": c, "n_iter": 40}) for r, c in product((8, 16, 24, 32), (3e-4, 1e-3, 3e-3))],
    "als": [(r, {"ridge": c, "n_iter": 40}) for r, c in product((16, 32, 48, 64), (3e-4, 1e-3, 3e-3))],
    "kronecker": [
        *((k, {"shape": (64, 64), "n_iter": 40}) for k in (1, 2, 4, 8, 16)),
        *((k, {"shape": (32, 32), "n_iter": 40}) for k in (4, 8, 16, 32)),
    ],
}


@dataclass(frozen=True, kw_only=True)
class Inpainted:
    """One filled image: clamped to [0, 1], its PSNR over the missing pixels, what was chosen, seconds of each part."""

    method: str
    image: Tensor
    psnr: float
    rank: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    num_parameters: int = 0
    fit_s: float = 0.0
    selection_s: float = 0.0

    @property
    def rmse(self) -> float:
        """Over the missing pixels, of intensities in [0, 1]."""
        return float(10 ** (-self.psnr / 20))

    @property
    def setting(self) -> str:
        """Rank and λ or shape, for a table."""
        shown = {name: value for name, value in self.options.items() if name != "n_iter"}
        return ", ".join([f"rank {self.rank}", *(f"{name} {value}" for name, value in shown.items())])


def load_image(name: str) -> Tensor:
    """A 512² photograph of scikit-image in [0, 1], fp32."""
    from skimage import data

    return torch.from_numpy(getattr(data, name)()).float() / 255.0


def masks(shape: Iterable[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """P (1 where a pixel is observed) and V <= P (1 where it is kept for validation), both fp32."""
    draws = torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed))
    observed = (draws[0] >= MISSING).float()
    return observed, observed * (draws[1] < VALIDATION).float()


def fit(image: Tensor, weights: Tensor, method: str, rank: int, options: dict[str, Any]) -> Any:
    """Our masked decomposition; pixels under a zero weight are not read."""
    from lowrank.blocks import BlockMatrix
    from lowrank.decompositions import decompose
    from lowrank.executor import SerialExecutor
    from lowrank.rank import RankRule

    seen = torch.where(weights > 0, image, torch.nan)
    return decompose(
        BlockMatrix.from_tensor("image", seen),
        method=method,
        rule=RankRule(rank=rank),
        weights=BlockMatrix.from_tensor("observed", weights),
        executor=SerialExecutor(),
        **options,
    ).factors


def squared_error(image: Tensor, found: Tensor, where: Tensor) -> float:
    """Mean squared error over the pixels of a mask, in fp64."""
    return float(((found.clamp(0, 1) - image).double().square() * where).sum() / where.sum())


def inpaint(image: Tensor, method: str, seed: int = 0) -> Inpainted:
    """Choose from the method's grid on validation pixels, fit on all observed ones, score the missing ones."""
    observed, validation = masks(image.shape, seed)
    began = time.perf_counter()
    scores = []
    for rank, options in GRIDS[method]:
        found = fit(image, observed - validation, method, rank, options).reconstruct()
        scores.append(squared_error(image, found, validation))
    rank, options = GRIDS[method][scores.index(min(scores))]
    chosen = time.perf_counter()
    factors = fit(image, observed, method, rank, options)
    ended = time.perf_counter()
    found = factors.reconstruct().clamp(0, 1)
    return Inpainted(
        method=method,
        image=torch.where(observed > 0, image, found),
        psnr=psnr(squared_error(image, found, 1 - observed)),
        rank=rank,
        options=options,
        num_parameters=factors.num_parameters,
        fit_s=ended - chosen,
        selection_s=chosen - began,
    )


def biharmonic(image: Tensor, seed: int = 0) -> Inpainted:
    """scikit-image's `inpaint_biharmonic` of the same pixels."""
    from skimage.restoration import inpaint_biharmonic

    observed, _ = masks(image.shape, seed)
    began = time.perf_counter()
    found = torch.from_numpy(inpaint_biharmonic((image * observed).numpy(), (observed == 0).numpy())).float()
    error = squared_error(image, found, 1 - observed)
    return Inpainted(method="biharmonic", image=found, psnr=psnr(error), fit_s=time.perf_counter() - began)


def psnr(mean_squared_error: float) -> float:
    """−10 log₁₀ MSE, for intensities in [0, 1]."""
    return float(-10 * torch.log10(torch.tensor(mean_squared_error, dtype=torch.float64)))


def picture(found: dict[str, list[Inpainted]], path: Path) -> None:
    """Truth, what is observed and the reconstructions, one row per image."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    columns = 2 + max(map(len, found.values()))
    figure, axes = plt.subplots(len(found), columns, figsize=(2.3 * columns, 2.5 * len(found)), squeeze=False)
    for line, (name, results) in zip(axes, found.items()):
        image = load_image(name)
        observed, _ = masks(image.shape)
        panels = [(name, image), ("50 % of the pixels", torch.where(observed > 0, image, 0.0))]
        panels += [(f"{r.method}, {r.psnr:.2f} dB", r.image) for r in results]
        for axis, (title, values) in zip(line, panels):
            axis.imshow(values.numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_title(title, fontsize=9)
            axis.axis("off")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def table(found: dict[str, list[Inpainted]]) -> str:
    """Markdown rows: image, method, PSNR of the missing pixels, setting, numbers held."""
    lines = ["| image | method | PSNR of the missing pixels | chosen | numbers held |", "|---|---|---|---|---|"]
    for name, results in found.items():
        for r in results:
            facts = f"{r.setting} | {r.num_parameters:,}" if r.num_parameters else "– | –"
            lines.append(f"| {name} | {r.method} | {r.psnr:.2f} dB | {facts} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, draw, and replace the table of docs/inpainting.md."""
    found: dict[str, list[Inpainted]] = {}
    for name in sys.argv[1:] or IMAGES:
        image = load_image(name)
        found[name] = [*(inpaint(image, method) for method in GRIDS), biharmonic(image)]
        print(table({name: found[name]}), flush=True)
    picture(found, ROOT / "docs" / "images" / "inpainting.png")
    page = ROOT / "docs" / "inpainting.md"
    page.write_text(f"{page.read_text().partition(MARK)[0]}{MARK}\n\n{table(found)}")


if __name__ == "__main__":
    main()
