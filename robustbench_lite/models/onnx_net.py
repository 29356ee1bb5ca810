"""Nets in ONNX files as differentiable PyTorch nets, by onnx2torch; what it makes of one is compared with onnxruntime.

An ONNX file is a protocol buffer: reading it runs nothing. The extra `onnx` brings the three packages.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from robustbench_lite.models.onnx_graph import free_batch, lowered, with_plain_reshapes

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["ChannelsLast", "load_onnx"]

INSTALL = "pip install 'robustbench_lite[onnx]'"
TOLERANCE = 1e-4  # of the largest logit: float32 through some tens of layers, summed in another order
_FLOAT32 = 1  # onnx.TensorProto.FLOAT


class ChannelsLast(nn.Module):
    """Images (B, C, H, W) as (B, H, W, C), for nets that come from TensorFlow."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the images with their channels last."""
        return x.permute(0, 2, 3, 1)


def load_onnx(
    file: str | Path, *, in_channels: int | None = None, image_size: int | tuple[int, int] | None = None
) -> nn.Module:
    """Return the net of an ONNX file, in eval mode: images (B, C, H, W) to logits (B, K), differentiable.

    The file's net has one input and one output. It may take images as (B, C, H, W), (B, H, W, C) or flat, and a batch
    of a fixed size, which is then freed. The result is compared with onnxruntime on random images, each alone: a net
    that was converted wrongly, or that mixes the images of a batch, is refused.

    Args:
        file: its path; weights in files beside it are found.
        in_channels: of the images; None, as for the next: what the file declares.
        image_size: H = W, or (H, W).

    Raises:
        ImportError: the extra `onnx` is not installed.
        FileNotFoundError: no such file.
        ValueError: no ONNX file, several inputs or outputs, images of another shape, operators that cannot be
            converted, or a net that computes something else after the conversion.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no ONNX file {path}")
    proto = _read(path)
    name, declared = _input_of(proto, path)
    image = _image_shape(declared, in_channels, image_size, path)
    first = _first_layers(declared[1:], image, path)
    fixed = declared[0] or 0
    samples = torch.rand(2 * max(fixed, 1), *image, generator=torch.Generator().manual_seed(0))
    expected = _by_onnxruntime(path, name, first(samples), max(fixed, 1))
    net = _converted(free_batch(lowered(proto)), first(samples), path, fixed)
    whole = nn.Sequential(first, net).eval() if len(first) else net
    _compare(whole, samples, expected, path, fixed)
    return whole


def _read(path: Path) -> ModelProto:
    try:
        import onnx
        import onnx2torch
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"nets in ONNX need the extra onnx ({error}): {INSTALL}") from error
    del onnx2torch, onnxruntime  # that they are there is enough
    from google.protobuf.message import DecodeError

    try:
        proto = onnx.load(str(path))
        onnx.checker.check_model(proto)
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise ValueError(f"{path} is no ONNX file or is damaged: {str(error).strip().splitlines()[0]}") from error
    return proto


def _input_of(proto: ModelProto, path: Path) -> tuple[str, list[int | None]]:
    """Return the name and the shape of the one input; None stands for a size that is not fixed."""
    held = {weight.name for weight in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in held]
    for what, values in (("input", inputs), ("output", list(proto.graph.output))):
        if len(values) != 1:
            names = ", ".join(value.name for value in values) or "none"
            raise ValueError(
                f"{path} has {len(values)} {what}s ({names}); a classifier has one input, images, and one output, "
                "logits: export such a net"
            )
    kind = inputs[0].type.tensor_type
    if kind.elem_type != _FLOAT32:
        raise ValueError(f"{path} takes no float32 images: export a net whose input is float32, in [0, 1]")
    sizes = [size.dim_value or None for size in kind.shape.dim]
    if len(sizes) < 2:
        raise ValueError(f"{path} takes an input of {len(sizes)} dimensions; images need (batch, ...)")
    return inputs[0].name, sizes


def _image_shape(
    declared: list[int | None], channels: int | None, size: int | tuple[int, int] | None, path: Path
) -> tuple[int, int, int]:
    """Return (C, H, W): as told, else as declared."""
    if channels is not None and size is not None:
        return (channels, size, size) if isinstance(size, int) else (channels, *size)
    sizes = [extent for extent in declared[1:] if extent is not None]
    if len(sizes) != 3 or len(declared) != 4:
        raise ValueError(f"{path} does not say what images it takes: give in_channels and image_size")
    return sizes[0], sizes[1], sizes[2]


def _first_layers(declared: list[int | None], image: tuple[int, int, int], path: Path) -> nn.Sequential:
    """Return what brings images (B, C, H, W) into the form that the net takes."""
    channels, height, width = image
    if _fits(declared, image):
        return nn.Sequential()
    if _fits(declared, (height, width, channels)):
        return nn.Sequential(ChannelsLast())
    pixels = channels * height * width
    flat = [extent for extent in declared if extent != 1]
    if flat in ([pixels], [None]):
        shape = [extent or pixels for extent in declared]
        return nn.Sequential(nn.Flatten(), *([nn.Unflatten(1, shape)] if len(shape) > 1 else []))
    wanted = "x".join(str(extent or "any") for extent in declared)
    raise ValueError(f"{path} takes inputs of {wanted}, the images are {channels}x{height}x{width}")


def _fits(declared: list[int | None], shape: tuple[int, ...]) -> bool:
    return len(declared) == len(shape) and all(a in (None, b) for a, b in zip(declared, shape, strict=True))


def _by_onnxruntime(path: Path, name: str, samples: Tensor, size: int) -> Tensor:
    """Return the logits of the file as it is, `size` samples at a time."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: its advice on how to slim the file is not for us
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        parts = [session.run(None, {name: part.numpy()})[0] for part in torch.split(samples, size)]
    except Exception as error:  # its exceptions have no common class but this
        raise ValueError(f"onnxruntime cannot run {path}: {str(error).strip().splitlines()[0]}") from error
    logits = torch.cat([torch.from_numpy(part) for part in parts])
    if logits.ndim != 2 or len(logits) != len(samples):
        raise ValueError(
            f"{path} must give logits (batch, classes), got {tuple(logits.shape)} for {len(samples)} images"
        )
    return logits


def _converted(proto: ModelProto, samples: Tensor, path: Path, fixed: int) -> nn.Module:
    from onnx2torch import convert

    try:
        net: Any = convert(proto).eval()
    except NotImplementedError as error:
        raise ValueError(f"onnx2torch cannot convert {path}: {error}") from error
    except Exception as error:  # it looks things up and finds nothing
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"onnx2torch cannot convert {path} ({said}); export it with opset_version=17") from error
    try:
        return with_plain_reshapes(net, samples)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ValueError(_no_batches(path, fixed, str(error).strip().splitlines()[0])) from error


@torch.no_grad()
def _compare(net: nn.Module, samples: Tensor, expected: Tensor, path: Path, fixed: int) -> None:
    logits = net(samples)
    if logits.shape != expected.shape:
        raise ValueError(_no_batches(path, fixed, f"{len(samples)} images give an output of {tuple(logits.shape)}"))
    off = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    if not off <= TOLERANCE:
        raise ValueError(
            f"{path} computes something else as a PyTorch net: its logits are off by {off:.2g} of the largest. Either "
            "onnx2torch converts one of its operators wrongly, or it mixes the images of a batch"
        )


def _no_batches(path: Path, fixed: int, why: str) -> str:
    here = f"it was exported for batches of {fixed}" if fixed else "its batch is not fixed"
    return (
        f"{path} cannot take a batch of any size: {why} ({here}). Export it with a batch that may vary: "
        "torch.onnx.export(net, (x,), 'net.onnx', dynamic_shapes=({0: torch.export.Dim('batch')},))"
    )
