"""The README of an exported student: what it is, what it may be used for, how it is loaded."""

import re
from collections.abc import Mapping
from typing import Any

import jinja2

from pathokd.models.cards import ModelCard

_SPDX = {
    "apache-2.0",
    "mit",
    "cc-by-4.0",
    "cc-by-nc-4.0",
    "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-4.0",
    "bsd-3-clause",
}

_TEMPLATE = """\
---
library_name: timm
license: {{ hub_licence }}
pipeline_tag: image-feature-extraction
tags: [pathology, knowledge-distillation, pathokd]
---
# {{ card.name }}

{% if untrained -%}
A vision transformer with random weights, written by pathokd {{ version }}: a control that has learnt nothing.
{%- else -%}
A vision transformer for H&E tiles, distilled with pathokd {{ version }}{% if teacher %} from {{ teacher }}{%
endif %}.
{%- endif %}


| | |
|---|---|
| Architecture | {{ card.architecture }}, {{ card.depth }} blocks, width {{ card.embed_dim }} |
| Parameters | {{ "{:,}".format(card.params) }} |
| Input | {{ card.image_px }} x {{ card.image_px }} px RGB at {{ mpp }} |
| Mean | {{ card.mean | join(", ") }} |
| Std | {{ card.std | join(", ") }} |
| Tokens | class token at index 0, {{ card.num_prefix_tokens - 1 }} registers, then \
{{ card.grid[0] }} x {{ card.grid[1] }} patches, row by row |
| Embedding | {{ card.readout }}, {{ card.readout_dim }} values |
| Teacher | {{ teacher or "not stated" }} |
| Training data | {{ data or "not stated" }} |
| Licence | {{ licence }} |
| SHA-256 of the weights | {{ sha256 }} |

## Licence

{{ licence_note }}

## Metrics
{% if metrics %}
| metric | value |
|---|---:|
{% for name, value in metrics -%}
| {{ name }} | {{ value }} |
{% endfor %}
{%- else %}
None were stated at export.
{% endif %}
## Loading

In plain timm (1.0.29 or later), from this folder (the input must be resized and normalised as in the table):

```python
import timm

model = timm.create_model("local-dir:PATH/TO/THIS/FOLDER", pretrained=True{{ load_kwargs }}).eval()
cls = model(images)                      # the class token, ({{ card.embed_dim }},) per tile
tokens = model.forward_features(images)  # all tokens
```

In pathokd, which normalises by itself:

```python
from pathokd import load_encoder, readout

encoder = load_encoder("PATH/TO/THIS/FOLDER").eval()
features = encoder(images)               # uint8 (batch, 3, height, width); features.cls, features.patches
embedding = readout(features, "{{ card.readout }}")
```
{% if adaptors %}
## Adaptors

`adaptors.safetensors` holds heads that map this model's features into the spaces of its teachers:
`pathokd.export.load_adaptors("PATH/TO/THIS/FOLDER")` returns them by name.

| name | from | to |
|---|---:|---:|
{% for name, spec in adaptors -%}
| {{ name }} | {{ spec.in_dim }} | {{ spec.out_dim }} |
{% endfor %}
{%- endif %}
"""


def licence_note(licence: str, teacher: str | None, *, given: bool = False) -> str:
    """What the teacher's licence means for the student, in words.

    Args:
        licence: the licence the student carries.
        teacher: the teacher's name, if it is known.
        given: it was named at export, in place of the teacher's.

    Returns:
        One paragraph. It is a reminder, not legal advice.
    """
    source = f"its teacher {teacher}" if teacher else "its teacher"
    origin, terms = (
        (f"as named at export (whether the terms of {source} allow it was not checked)", "these terms")
        if given
        else (f"inherited from {source}", "the teacher's terms")
    )
    words = re.sub(r"[^a-z0-9.]+", "-", licence.lower())
    non_commercial = "-nc-" in f"{words}-" or "non-commercial" in words or "noncommercial" in words
    if "-nd-" in f"{words}-":
        forbidden, kept = ("commercial use and ", "private and non-commercial") if non_commercial else ("", "private")
        return (
            f"{licence}, {origin}: {terms} forbid {forbidden}the sharing of derived works. "
            f"Keep this student {kept} unless the teacher's owners allow more."
        )
    if non_commercial:
        return f"{licence}, {origin}: no commercial use of this student or of what it computes."
    if words in ("", "unknown"):
        return f"The licence of {source} is not known to pathokd: find it out before sharing this student."
    if not all(name in _SPDX for name in words.split("-and-")):
        return f"{licence}, {origin}: pathokd does not know what it allows; read it before sharing this student."
    return f"{licence}, {origin}: keep its notices when sharing this student."


def render_card(
    card: ModelCard,
    *,
    licence: str,
    facts: Mapping[str, Any],
    sha256: str,
    version: str,
    adaptors: Mapping[str, Mapping[str, Any]],
    load_kwargs: str = "",
    licence_given: bool = False,
) -> str:
    """The text of README.md.

    Args:
        card: the student's card.
        licence: the licence it carries.
        facts: `teacher`, `data` (strings) and `metrics` (name to number or text) are shown, and `untrained` says that
            the weights are random; other keys are not.
        sha256: hash of the weights.
        version: pathokd's version.
        adaptors: settings of each exported head.
        load_kwargs: extra arguments plain timm needs, starting with a comma; usually empty.
        licence_given: the licence was named at export, and is not the teacher's.

    Returns:
        Markdown with a hub header.
    """
    environment = jinja2.Environment(autoescape=False, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    teacher = str(facts["teacher"]) if facts.get("teacher") else None
    metrics = [(name, _number(value)) for name, value in dict(facts.get("metrics") or {}).items()]
    return environment.from_string(_TEMPLATE).render(
        card=card,
        teacher=teacher,
        untrained=bool(facts.get("untrained")),
        data=facts.get("data"),
        metrics=metrics,
        mpp="an unstated resolution" if card.mpp is None else f"{card.mpp:g} um per pixel",
        licence=licence,
        licence_note=licence_note(licence, teacher, given=licence_given),
        hub_licence=licence.lower() if licence.lower() in _SPDX else "other",
        sha256=sha256,
        version=version,
        adaptors=[(name, spec) for name, spec in adaptors.items() if spec["type"] == "projector"],
        load_kwargs=load_kwargs,
    )


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
