"""Randomized smoothing: speed, coverage, draws with early stopping, certified-accuracy curves.

    RBL_DATA=... python benchmarks/smoothing.py speed --net mnist/standard --n 100000
    python benchmarks/smoothing.py coverage
    python benchmarks/smoothing.py stopping
    RBL_DATA=... python benchmarks/smoothing.py curves --net gaussian --sigma 0.25 0.5 1 --images 1000 --n 10000
    RBL_DATA=... python benchmarks/smoothing.py certified --entries mnist/gaussian_0.5 --images 1000 --n 10000

`speed` runs CERTIFY for each image against a plain loop in the same process, in turn: the loop draws noise for one
image, a batch at a time, asks the net and counts on the host, as the published code does (there with batches of 1,000).
The share of the top class must agree. `coverage` and `stopping` use a linear classifier whose probabilities are known.
`curves` takes a net of the zoo, or trains one with Gaussian noise for each sigma ("gaussian": 256 hidden units, so that
the curve is there in minutes).
`certified` is about smoothed classifiers of the zoo, each with its own sigma: the certified accuracy of the literature,
that of the answers as deployed (within the radius one call of `predict` is right with probability 1 - alpha), and the
accuracy of those answers on the clean images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from nets import DATA, wide_resnet
from scipy.stats import binomtest, norm
from torch import Tensor, nn

from robustbench_lite.certify import (
    CertifiedAccuracy,
    EarlyStopping,
    FixedSampleSize,
    GaussianNoise,
    PixelDP,
    RandomizedSmoothing,
    RenyiSmoothing,
    log_rank,
)
from robustbench_lite.certify.stopping import Stopping
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.defenses import SmoothedClassifier, SmoothedVote
from robustbench_lite.models import MLP
from robustbench_lite.zoo import load_defense


@torch.no_grad()
def plain_loop(model: nn.Module, x: Tensor, sigma: float, n: int, batch: int) -> np.ndarray:
    """Count the answers about one image (C, H, W), one batch of noise after another."""
    counts = np.zeros(10, dtype=int)
    while n > 0:
        size = min(batch, n)
        n -= size
        copies = x.repeat((size, 1, 1, 1))
        noise = torch.randn_like(copies) * sigma
        for label in model(copies + noise).argmax(1).cpu().numpy():
            counts[label] += 1
    return counts


def timed(run: Callable[[], np.ndarray]) -> tuple[np.ndarray, float, float]:
    """Return what `run` returns, its wall time and its processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found, time.perf_counter() - wall, time.process_time() - cpu


def net_and_images(options: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """Return a net of the zoo and MNIST images, or a WideResNet-28-10 and random ones."""
    if options.net == "wide_resnet_28_10":
        subject = wide_resnet(options.images, options.device)
        return subject.model, subject.x
    data = load_data("mnist", data_dir=DATA).sample(options.images, seed=0)
    return load_defense(options.net).to(options.device).eval(), data.images.to(options.device)


def speed(options: argparse.Namespace) -> None:
    """Print seconds for an image, ours and the plain loop's, and the ratios."""
    model, x = net_and_images(options)
    method = RandomizedSmoothing(options.sigma[0], n=options.n)
    method.votes(model, x[:1])
    print(
        f"{options.net}, sigma {options.sigma[0]}, n = {options.n}, {options.device}; seconds for an image, wall (cpu)"
    )
    for number in range(len(x)):
        ours, *mine = timed(lambda row=number: method.votes(model, x[row : row + 1]).counts[0].cpu().numpy())
        line = f"image {number}: ours {mine[0]:7.2f} ({mine[1]:6.2f})"
        for batch in options.batch:
            draws = min(options.n, options.plain_draws if batch == 1 else options.n)
            counts, *theirs = timed(lambda row=number, b=batch, d=draws: plain_loop(model, x[row], method.sigma, d, b))
            theirs = [t * options.n / draws for t in theirs]
            share, other = ours.max() / options.n, counts[ours.argmax()] / draws
            if abs(share - other) > 5 * (0.25 / draws) ** 0.5:
                raise SystemExit(f"the votes differ: {share:.4f} and {other:.4f}")
            line += f" | loop of {batch}: {theirs[0]:7.2f} ({theirs[1]:6.2f}), ratio {theirs[0] / mine[0]:5.2f}"
            line += f" ({theirs[1] / mine[1]:.2f})" + (f" from {draws} draws" if draws < options.n else "")
        print(line, flush=True)
    votes, *all_ = timed(lambda: method.votes(model, x).counts.cpu().numpy())
    print(f"all {len(votes)} together: {all_[0] / len(x):.2f} ({all_[1] / len(x):.2f}) an image")


class HalfSpace(nn.Module):
    """Class 1 where the mean of the image exceeds 1/2."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        lead = (x - 0.5).flatten(1).sum(1)
        return torch.stack([-lead, lead], dim=1)


def at_probability(p: float, sigma: float, count: int) -> Tensor:
    """Return images (count, 1, 2, 2) whose class 1 has the probability p under noise."""
    return torch.full((count, 1, 2, 2), 0.5 + sigma * float(norm.ppf(p)) / 2, dtype=torch.float64)


def coverage(options: argparse.Namespace) -> None:
    """Print how often a certified radius exceeds the true one, beside alpha."""
    trials, sigma = options.trials, 0.25
    print("plan                 p      alpha     n  too large  share     [95 % interval]   mean draws")
    plans: list[Stopping] = [FixedSampleSize(), EarlyStopping()]
    for plan in plans:
        for p, alpha, n in ((0.6, 0.1, 500), (0.8, 0.1, 1000), (0.9, 0.05, 1000), (0.99, 0.01, 2000)):
            x, true = at_probability(p, sigma, trials), sigma * float(norm.ppf(p))
            method = RandomizedSmoothing(sigma, n=n, alpha=alpha, stopping=plan)
            y = torch.ones(trials, dtype=torch.int64)
            found = method(HalfSpace(), x, y, Lp("l2", true * (1 - 1e-9)), batch_size=4096)
            wrong, draws = int((found.radius > true).sum()), found.samples.double().mean()
            low, high = binomtest(wrong, trials).proportion_ci(0.95)
            line = f"{type(plan).__name__:16} {p:6.2f} {alpha:8.3f} {n:7d} {wrong:7d} {wrong / trials:10.5f}"
            print(f"{line} [{low:.5f}, {high:.5f}] {draws:9.0f}", flush=True)


def stopping(options: argparse.Namespace) -> None:
    """Print the draws that early stopping takes, by the probability of the class."""
    sigma, needed = 0.25, float(norm.cdf(1))
    method = RandomizedSmoothing(sigma, stopping=EarlyStopping())
    print(f"alpha 0.001, R = sigma needs p > {needed:.4f}; draws include n0 = 100; fixed plans take 100,100")
    for p in (0.5, 0.7, 0.8, 0.83, 0.85, 0.87, 0.9, 0.95, 0.99, 0.999):
        count = options.trials if abs(p - needed) > 0.02 else min(options.trials, 20)
        x, y = at_probability(p, sigma, count), torch.ones(count, dtype=torch.int64)
        found = method(HalfSpace(), x, y, Lp("l2", sigma), batch_size=4096)
        draws, share = found.samples.double(), found.certified.double().mean()
        print(
            f"p {p:.4f}: mean {draws.mean():8.0f}, largest {draws.max():7.0f}, certified {share:.3f} of {count}",
            flush=True,
        )


def gaussian_net(sigma: float, epochs: int) -> nn.Module:
    """Train a net of 256 hidden units on MNIST with fresh Gaussian noise at each step, from a fixed seed."""
    torch.manual_seed(0)
    train, net = load_data("mnist", "train", data_dir=DATA), MLP(hidden=[256])
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    steps = epochs * (len(train) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(train))[: len(train) // 128 * 128].split(128):
            x = train.images[rows]
            loss = nn.functional.cross_entropy(net(x + sigma * torch.randn_like(x)), train.labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return net.eval()


def curves(options: argparse.Namespace) -> None:
    """Print certified accuracy by radius with its 95 % band, for each sigma, and compare the curves and bounds."""
    data, found = load_data("mnist", data_dir=DATA).sample(options.images, seed=0), {}
    for sigma in options.sigma:
        start = time.perf_counter()
        net = gaussian_net(sigma, options.epochs) if options.net == "gaussian" else load_defense(options.net).eval()
        net, x, y = net.to(options.device), data.images.to(options.device), data.labels.to(options.device)
        method, trained = RandomizedSmoothing(sigma, n=options.n), time.perf_counter() - start
        votes, threat = method.votes(net, x), Lp("l2", 0.0)
        certificate = method.certify_votes(votes, y, threat)
        ceiling = method.largest_radius("l2", x.shape[1:])
        curve = CertifiedAccuracy(certificate.radius.cpu(), certificate.certified.cpu(), ceiling)
        found[sigma] = curve
        seconds = time.perf_counter() - start - trained
        print(
            f"sigma {sigma}: {options.net} in {trained:.0f} s, {len(x)} images in {seconds:.0f} s, n = {options.n}",
            flush=True,
        )
        print(f"  abstained {int((certificate.prediction < 0).sum())}, at the ceiling {ceiling:.4f}: ", end="")
        print(int((certificate.radius >= ceiling).sum()))
        radii = np.arange(0, ceiling, 0.25)
        for radius, share, low, high in zip(radii, curve.accuracy(radii), *curve.band(radii), strict=True):
            print(f"  radius {radius:.2f}: certified {100 * share:5.1f} % [{100 * low:5.1f}, {100 * high:5.1f}]")
        others = (RenyiSmoothing(sigma, n=options.n), PixelDP(GaussianNoise(sigma), n=options.n))
        bounds = (method, *others)
        means = [m.certify_votes(votes, y, threat) for m in bounds]
        text = ", ".join(
            f"{type(m).__name__} {c.radius[c.certified].mean():.4f}" for m, c in zip(bounds, means, strict=True)
        )
        print(f"  mean radius of the certified, same votes: {text}", flush=True)
    for one, other in zip(list(found)[:-1], list(found)[1:], strict=True):
        print(f"log-rank, sigma {one} against {other}: p = {log_rank(found[one], found[other]):.2g}")


def certified(options: argparse.Namespace) -> None:
    """Print the certified accuracy of smoothed classifiers of a zoo, by radius, with 95 % bands."""
    data = load_data("mnist", data_dir=DATA).sample(options.images, seed=0)
    x, y = data.images.to(options.device), data.labels.to(options.device)
    for name in options.entries:
        defense = load_defense(name, options.device, root=options.root)
        if not isinstance(defense, SmoothedClassifier):
            raise SystemExit(f"{name} is a {type(defense).__name__}: only smoothed classifiers have these curves")
        start = time.perf_counter()
        alone = RandomizedSmoothing(defense.sigma, n0=defense.n0, n=options.n, alpha=defense.alpha)
        votes = alone.votes(defense.net, x)
        own = SmoothedVote(defense.sigma, defense.draws, n0=defense.n0, n=options.n, alpha=defense.alpha)
        torch.manual_seed(0)
        answers = torch.cat([defense.predict(part) for part in x.split(250)])
        right, silent = float((answers == y).double().mean()), float((answers < 0).double().mean())
        print(
            f"{name}: sigma {defense.sigma}, {len(x)} images, n0 = {defense.n0}, n = {options.n}, alpha = "
            f"{defense.alpha}, {time.perf_counter() - start:.0f} s; predict with {defense.draws} draws: clean "
            f"{100 * right:.1f} %, abstains {100 * silent:.1f} %",
            flush=True,
        )
        for title, method in (("literature", alone), ("as deployed", own)):
            found, ceiling = method.certify_votes(votes, y, Lp("l2", 0.0)), method.largest_radius("l2", x.shape[1:])
            curve = CertifiedAccuracy(found.radius.cpu(), found.certified.cpu(), ceiling)
            radii = np.array([radius for radius in options.radii if radius <= ceiling])
            text = (
                f"{radius:g}: {100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
                for radius, share, low, high in zip(radii, curve.accuracy(radii), *curve.band(radii), strict=True)
            )
            print(f"  {title:11} (ceiling {ceiling:.2f}) " + ", ".join(text), flush=True)


def main() -> None:
    """Run one of the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "coverage", "stopping", "curves", "certified"])
    parser.add_argument(
        "--net", default="mnist/standard", help="of the zoo; for speed also 'wide_resnet_28_10', for curves 'gaussian'"
    )
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.25])
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 1000], help="of the plain loop")
    parser.add_argument("--plain-draws", type=int, default=20_000, help="draws of the loop of 1, scaled up to n")
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--entries", nargs="+", default=["mnist/gaussian_0.5"], help="of the zoo; for certified")
    parser.add_argument("--root", type=Path, default=None, help="folder of another zoo; for certified")
    parser.add_argument("--radii", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    {"speed": speed, "coverage": coverage, "stopping": stopping, "curves": curves, "certified": certified}[
        options.what
    ](options)


if __name__ == "__main__":
    main()
