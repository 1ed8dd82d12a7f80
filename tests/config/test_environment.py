"""What a config takes from the environment is not written to files."""

import pytest
from omegaconf import OmegaConf

from trainer.config.environment import hide_environment


def test_values_give_way_to_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUR_PLACE", "place of someone")
    monkeypatch.setenv("OUR_PROMPT", "place of someone else")
    monkeypatch.setenv("OUR_LETTER", "x")
    monkeypatch.setenv("OUR_EMPTY", "")
    monkeypatch.delenv("OUR_NOTHING", raising=False)
    written = {
        "a": {
            "b": "${oc.env:OUR_PLACE}/shards",
            "c": ["${oc.env:OUR_PROMPT,none}", "${a.b}"],
            "d": "${oc.env:OUR_LETTER}",
        },
        "e": "${oc.env:OUR_EMPTY}${oc.env:OUR_NOTHING, default/place}",
    }
    text = "index of place of someone/shards and place of someone else in default/place, max steps"
    hidden = "index of ${oc.env:OUR_PLACE}/shards and ${oc.env:OUR_PROMPT} in ${oc.env:OUR_NOTHING}, max steps"
    assert hide_environment(text, written) == hidden
    for spelling in ("${oc.env:'OUR_PLACE'}", "${oc.env:OUR_PLACE,${run.name}}", "${ oc.env: OUR_PLACE }"):
        assert OmegaConf.create({"a": spelling, "run": {"name": "x"}}).a == "place of someone"
        assert hide_environment("in place of someone", {"a": spelling}) == "in ${oc.env:OUR_PLACE}"
    # other interpolations are nobody's secret: a command with them in it could not be typed
    assert (
        hide_environment("runs/demo_16", {"run": {"name": "demo_${data.size}"}, "data": {"size": 16}}) == "runs/demo_16"
    )
