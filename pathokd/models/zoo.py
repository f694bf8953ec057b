"""The table of cards: published pathology encoders, and DINOv2 as a natural-image reference.

Sources. [M] method.md of this project. [T] TRIDENT's loader and [E] eva's backbones (load calls,
normalisation, which tokens are registers). [H] the model's own page. Sizes and parameter counts are those
timm builds from the arguments here. `mpp` is the resolution at which the model is usually run; models
trained on several say so in a comment. Licences change: read the model's page before publishing anything
derived from it.
"""

import difflib
from typing import Any

from pathokd.models.build import SWIGLU_ARGS
from pathokd.models.cards import KeyLayout, ModelCard
from pathokd.models.features import Readout

Colour = tuple[float, float, float]

IMAGENET: tuple[Colour, Colour] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: tuple[Colour, Colour] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BIOPTIMUS: tuple[Colour, Colour] = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
HIBOU: tuple[Colour, Colour] = ((0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816))

DYNAMIC: dict[str, Any] = {"dynamic_img_size": True}
NC_ND = "CC-BY-NC-ND-4.0"
KAIKO = "kaiko-non-commercial"


def _card(
    name: str,
    source: str,
    architecture: str,
    shape: tuple[int, int, int, int],
    params: int,
    *,
    args: dict[str, Any],
    colour: tuple[Colour, Colour],
    licence: str,
    gated: bool,
    readout: Readout = "cls",
    mpp: float | None = 0.5,
    key_layout: KeyLayout = "timm",
) -> ModelCard:
    """A card at 224 px; `shape` is (embed_dim, depth, patch_px, num_prefix_tokens)."""
    embed_dim, depth, patch_px, num_prefix_tokens = shape
    return ModelCard(
        name=name,
        source=f"hf-hub:{source}",
        architecture=architecture,
        model_args=args,
        embed_dim=embed_dim,
        depth=depth,
        patch_px=patch_px,
        num_prefix_tokens=num_prefix_tokens,
        image_px=224,
        mpp=mpp,
        mean=colour[0],
        std=colour[1],
        readout=readout,
        licence=licence,
        gated=gated,
        params=params,
        key_layout=key_layout,
    )


def _bioptimus() -> list[ModelCard]:
    giant: dict[str, Any] = {"init_values": 1e-5, "dynamic_img_size": False}
    return [
        # [M] A.1. Gating of H-optimus-0 could not be confirmed; it asks for an agreement on its page.
        _card(
            "hoptimus0",
            "bioptimus/H-optimus-0",
            "vit_giant_patch14_reg4_dinov2",
            (1536, 40, 14, 5),
            1_134_774_272,
            args=giant,
            colour=BIOPTIMUS,
            licence="Apache-2.0",
            gated=True,
        ),
        # [M] A.1, [T]: same call and shapes.
        _card(
            "hoptimus1",
            "bioptimus/H-optimus-1",
            "vit_giant_patch14_reg4_dinov2",
            (1536, 40, 14, 5),
            1_134_774_272,
            args=giant,
            colour=BIOPTIMUS,
            licence=NC_ND,
            gated=True,
        ),
        # [M] A.2. CLS is embedding 1; CLS + mean of the 256 patches is embedding 2.
        _card(
            "h0_mini",
            "bioptimus/H0-mini",
            "vit_base_patch14_reg4_dinov2",
            (768, 12, 14, 5),
            85_739_520,
            args={**SWIGLU_ARGS, "init_values": 1e-5},
            colour=BIOPTIMUS,
            licence=NC_ND,
            gated=True,
        ),
    ]


def _mahmood() -> list[ModelCard]:
    return [
        # [T], [H]: licence and gating on the model's page.
        _card(
            "uni_v1",
            "MahmoodLab/UNI",
            "vit_large_patch16_224",
            (1024, 24, 16, 1),
            303_350_784,
            args={"init_values": 1e-5, **DYNAMIC},
            colour=IMAGENET,
            licence=NC_ND,
            gated=True,
        ),
        # [T]: eight registers, not four.
        _card(
            "uni_v2",
            "MahmoodLab/UNI2-h",
            "vit_giant_patch14_224",
            (1536, 24, 14, 9),
            681_394_176,
            args={
                **SWIGLU_ARGS,
                **DYNAMIC,
                "patch_size": 14,
                "depth": 24,
                "num_heads": 24,
                "embed_dim": 1536,
                "init_values": 1e-5,
                "no_embed_class": True,
                "reg_tokens": 8,
            },
            colour=IMAGENET,
            licence=NC_ND,
            gated=True,
        ),
    ]


def _paige() -> list[ModelCard]:
    huge: dict[str, Any] = {**SWIGLU_ARGS, **DYNAMIC, "mlp_ratio": 5.3375, "init_values": 1e-5}
    return [
        # [T], [H]: Apache-2.0, with a request for access. 20x.
        _card(
            "virchow",
            "paige-ai/Virchow",
            "vit_huge_patch14_224",
            (1280, 32, 14, 1),
            631_229_184,
            args=huge,
            colour=IMAGENET,
            licence="Apache-2.0",
            gated=True,
            readout="cls+mean",
        ),
        # [T], [E]. Trained on 0.25 to 2 um/px. Class and register tokens own positions (no_embed_class is
        # not set).
        _card(
            "virchow2",
            "paige-ai/Virchow2",
            "vit_huge_patch14_224",
            (1280, 32, 14, 5),
            631_239_424,
            args={**huge, "reg_tokens": 4},
            colour=IMAGENET,
            licence=NC_ND,
            gated=True,
            readout="cls+mean",
        ),
    ]


def _others() -> list[ModelCard]:
    return [
        # [T], [H]. The published transform cuts 224 px out of a 256 px tile at 0.5 um/px.
        _card(
            "gigapath",
            "prov-gigapath/prov-gigapath",
            "vit_giant_patch14_dinov2",
            (1536, 40, 16, 1),
            1_134_953_984,
            args={"patch_size": 16, "init_values": 1e-5},
            colour=IMAGENET,
            licence="Apache-2.0",
            gated=True,
        ),
        # [H]: ViT-L/16 by DINOv2, safetensors in transformers' layout, public. LayerNorm and sizes as
        # Dinov2Config.
        _card(
            "phikon_v2",
            "owkin/phikon-v2",
            "vit_large_patch16_224",
            (1024, 24, 16, 1),
            303_350_784,
            args={"init_values": 1e-5},
            colour=IMAGENET,
            licence="Owkin non-commercial",
            gated=False,
            key_layout="transformers",
        ),
        # [H] config.json: 4 registers, SwiGLU, /14, 224 px. Resolution of use not stated where it could be
        # read.
        _card(
            "hibou_b",
            "histai/hibou-b",
            "vit_base_patch14_reg4_dinov2",
            (768, 12, 14, 5),
            85_739_520,
            args={**SWIGLU_ARGS},
            colour=HIBOU,
            licence="Apache-2.0",
            gated=False,
            key_layout="transformers",
        ),
        # Its config.json could not be read; taken to be as Hibou-B's (hidden 2736 by Dinov2's rule at width
        # 1024). That gives the 303.7 M parameters LazySlide quotes; a plain MLP would give 303.2 M.
        # Gating of both Hibou models could not be confirmed: sources differ.
        _card(
            "hibou_l",
            "histai/hibou-L",
            "vit_large_patch14_reg4_dinov2",
            (1024, 24, 14, 5),
            303_657_216,
            args={**SWIGLU_ARGS, "mlp_ratio": 5.34375},
            colour=HIBOU,
            licence="Apache-2.0",
            gated=True,
            key_layout="transformers",
        ),
        # [M] section B: CLS + mean patch. [H]: MIT, public, Dinov2Model. Trained on 0.25 to 2 um/px.
        _card(
            "midnight",
            "kaiko-ai/midnight",
            "vit_giant_patch14_dinov2",
            (1536, 40, 14, 1),
            1_134_769_664,
            args={"init_values": 1e-5},
            colour=HALF,
            licence="MIT",
            gated=False,
            readout="cls+mean",
            key_layout="transformers",
        ),
    ]


def _kaiko() -> list[ModelCard]:
    """[T], [H] of the timm copies that carry safetensors; trained on several resolutions."""
    sizes: list[tuple[str, str, str, tuple[int, int, int, int], int]] = [
        ("kaiko_vits16", "vit_small_patch16_224", "vit_small_patch16_224", (384, 12, 16, 1), 21_665_664),
        ("kaiko_vits8", "vit_small_patch8_224", "vit_small_patch8_224", (384, 12, 8, 1), 21_670_272),
        ("kaiko_vitb16", "vit_base_patch16_224", "vit_base_patch16_224", (768, 12, 16, 1), 85_798_656),
        ("kaiko_vitb8", "vit_base_patch8_224", "vit_base_patch8_224", (768, 12, 8, 1), 85_807_872),
        # Saved with positions for 518 px (304,370,688 parameters); resampled once, to 224 px.
        (
            "kaiko_vitl14",
            "vit_large_patch14_reg4_224",
            "vit_large_patch14_reg4_dinov2",
            (1024, 24, 14, 5),
            303_230_976,
        ),
    ]
    return [
        _card(
            name,
            f"1aurent/{repository}.kaiko_ai_towards_large_pathology_fms",
            architecture,
            shape,
            params,
            args=DYNAMIC,
            colour=HALF,
            licence=KAIKO,
            gated=False,
        )
        for name, repository, architecture, shape, params in sizes
    ]


def _dinov2() -> list[ModelCard]:
    """Natural images: no mpp. Saved with positions for 518 px, resampled once to 224 px. [H]."""
    sizes: list[tuple[str, str, tuple[int, int, int, int], int]] = [
        ("dinov2_vits14_reg", "vit_small_patch14_reg4_dinov2", (384, 12, 14, 5), 21_629_952),
        ("dinov2_vitb14_reg", "vit_base_patch14_reg4_dinov2", (768, 12, 14, 5), 85_727_232),
        ("dinov2_vitl14_reg", "vit_large_patch14_reg4_dinov2", (1024, 24, 14, 5), 303_230_976),
        ("dinov2_vitg14_reg", "vit_giant_patch14_reg4_dinov2", (1536, 40, 14, 5), 1_134_774_272),
    ]
    return [
        _card(
            name,
            f"timm/{architecture}.lvd142m",
            architecture,
            shape,
            params,
            args=DYNAMIC,
            colour=IMAGENET,
            licence="Apache-2.0",
            gated=False,
            mpp=None,
        )
        for name, architecture, shape, params in sizes
    ]


_ALL = [*_bioptimus(), *_mahmood(), *_paige(), *_others(), *_kaiko(), *_dinov2()]

CARDS: dict[str, ModelCard] = {card.name: card for card in _ALL}


def get_card(name: str) -> ModelCard:
    """The card of a known model.

    Raises:
        ValueError: no such card; the message lists the nearest names.
    """
    if name in CARDS:
        return CARDS[name]
    near = difflib.get_close_matches(name.lower().replace("-", "_"), CARDS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(CARDS)}."
    raise ValueError(f"No model card is called {name!r}: {hint}")


def card_names() -> list[str]:
    """Names of all cards, in the order of the table."""
    return list(CARDS)
