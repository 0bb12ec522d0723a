"""Where weights are published, by name: a network's as PaddleClas writes it, with _ssld where they were distilled.

The addresses are those of PaddleClas's code (MODEL_URLS in ppcls/arch/backbone/) and of its list of models
(model_list.md); whether they answer is known when they are asked. No sha256 is published with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ssld.importing.download import fetch

BASE = "https://paddle-imagenet-models-name.bj.bcebos.com/dygraph"
APACHE = "Apache-2.0"
WSL = "CC BY-NC 4.0, which does not allow commercial use"
_SIZES = ("x0_35", "x0_5", "x0_75", "x1_0", "x1_25")
_LEGENDARY = (
    *(f"ResNet{depth}" for depth in (18, 34, 50)),
    *(f"ResNet{depth}_vd" for depth in (18, 34, 50, 101, 152, 200)),
    *(f"MobileNetV3_{kind}_{size}" for kind in ("small", "large") for size in _SIZES),
    *(f"PPLCNet_{size}" for size in ("x0_25", "x0_35", "x0_5", "x0_75", "x1_0", "x1_5", "x2_0", "x2_5")),
    *("ESNet_x1_0", "HRNet_W18_C", "MobileNetV1", "PPHGNet_small", "PPHGNet_tiny"),
)
_OTHERS = (
    *("EfficientNetB0", "GhostNet_x1_0", "GhostNet_x1_3", "MobileNetV2", "Res2Net50_vd_26w_4s", "Res2Net101_vd_26w_4s"),
    *("ResNeXt101_32x8d_wsl", "ResNeXt101_32x16d_wsl"),
)
_DISTILLED = (
    *("ResNet34_vd", "ResNet50_vd", "ResNet101_vd", "Res2Net50_vd_26w_4s", "Res2Net101_vd_26w_4s", "HRNet_W18_C"),
    *("PPHGNet_tiny", "PPHGNet_small", "MobileNetV1", "MobileNetV2", "MobileNetV3_large_x1_0", "GhostNet_x1_3"),
    *("MobileNetV3_small_x1_0", "MobileNetV3_small_x0_35", "PPLCNet_x0_25", "PPLCNet_x0_5", "PPLCNet_x1_0"),
    "PPLCNet_x2_5",
)
_VERSIONS = {"ResNet50_vd_ssld_v2": "ResNet50_vd", "Fix_ResNet50_vd_ssld_v2": "ResNet50_vd"}


@dataclass(frozen=True)
class Published:
    """Weights of a network; urls: in the order in which they are asked."""

    network: str
    urls: tuple[str, ...]
    licence: str


def published(name: str) -> Published | None:
    """The weights of that name, such as ResNet50_vd, ResNet50_vd_ssld or Fix_ResNet50_vd_ssld_v2."""
    network = _VERSIONS.get(name) or name.removesuffix("_ssld")
    if network not in (*_LEGENDARY, *_OTHERS) or (name == f"{network}_ssld" and network not in _DISTILLED):
        return None
    folder = f"{BASE}/legendary_models" if network in _LEGENDARY and name not in _VERSIONS else BASE
    # the code of PaddleClas and its documents do not agree on this one
    names = (name, "ResNeXt101_32x16_wsl") if name == "ResNeXt101_32x16d_wsl" else (name,)
    urls = tuple(f"{folder}/{each}_pretrained.pdparams" for each in names)
    return Published(network, urls, WSL if name.endswith("_wsl") else APACHE)


@dataclass(frozen=True)
class Located:
    """A file of weights; network: whose they are said to be; out: where to write them, None for beside the file."""

    file: Path
    network: str | None = None
    out: Path | None = None


def locate(words: str, note: Callable[[str], None]) -> Located:
    """The file that is meant by a path, by an address, or by a name of `published`; raises like `fetch`.

    note: is told the licence of what is known by name.
    """
    if "://" in words:
        file = fetch([words], note)
        return Located(file, None, Path(file.with_suffix(".safetensors").name))
    found = None if Path(words).exists() else published(words)
    if found is None:
        return Located(Path(words))
    note(f"{words}: weights published with PaddleClas, licence {found.licence}")
    return Located(fetch(found.urls, note), found.network, Path(f"{words}.safetensors"))
