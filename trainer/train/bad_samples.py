"""Bad samples of all processes: counted together, said, recorded, and at last too many (data.max_substituted)."""

from typing import Any

from trainer.core.console import log
from trainer.core.errors import UserError
from trainer.train.launch import RunInputs

WAS_BAD = "it was bad before this resume"
MAX_SAID = 3  # substitutions that are said each time


class BadSamples:
    """The substitutions of a run that every process knows; without any where ``data.on_bad_sample`` is stop."""

    def __init__(self, inputs: RunInputs) -> None:
        self.inputs, self.known = inputs, inputs.data.substitutes
        resumed = inputs.resumed
        own = resumed is not None and not resumed.begins_fork
        self.records: list[dict[str, Any]] = []
        if resumed is not None and own:
            self.records = [{**each, "reason": WAS_BAD} for each in resumed.state.get("substituted", [])]
        if self.known is not None:
            self.known.learn(self.records)

    @property
    def count(self) -> int:
        """Samples of all steps for which others stood in."""
        return len(self.records)

    @property
    def recorded(self) -> list[dict[str, Any]]:
        """What a checkpoint says of them: without reasons, in which paths of this machine stand."""
        return [{name: value for name, value in record.items() if name != "reason"} for record in self.records]

    @property
    def most(self) -> int:
        """How many images of the set may be bad."""
        return max(1, int(self.inputs.config.data.max_substituted * self.inputs.facts["images"]))

    def gather(self, made: int) -> None:
        """Learn what all processes substituted in the first ``made`` steps. To be called by all of them.

        Raises:
            UserError: in all of them, when more images are bad than may be.
        """
        if self.known is None:
            return
        before = {(record["step"], record["position"]) for record in self.records}
        found = [record for records in self.inputs.processes.gather(self.known.before(made)) for record in records]
        self.records = [
            record for _, record in sorted({(each["step"], each["position"]): each for each in found}.items())
        ]
        self.known.learn(self.records)
        bad = {key for record in self.records for key in (record["key"], *record["passed"])}
        self.say([each for each in self.records if (each["step"], each["position"]) not in before], len(bad))
        if len(bad) > self.most:
            raise UserError(
                f"{len(bad)} of {self.inputs.facts['images']:,} images cannot be read, above data.max_substituted "
                f"{self.inputs.config.data.max_substituted:g} (at most {self.most}), so that training stops. "
                "scripts/verify_shards.py lists them; restore their shards from a copy. The last one: "
                f"{self.records[-1]['reason']}"
            )

    def say(self, new: list[dict[str, Any]], bad: int) -> None:
        """Warn of the substitutions that came since the last time."""
        for record in new[:MAX_SAID]:
            log.warning("warning: step %s: %s stands in for a bad sample: %s", record["step"], record["substitute"],
                        record["reason"])  # fmt: skip
        if new:
            more = f" ({len(new) - MAX_SAID} more of them are in the checkpoint)" if len(new) > MAX_SAID else ""
            log.warning("warning: %s images are bad so far, at most %s may be%s", bad, self.most, more)
