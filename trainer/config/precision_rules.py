"""Rules between number formats: what goes with 16-bit weights and gradients."""

from collections.abc import Iterator

from trainer.config.schema import Config


def precision_rules(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """The keys concerned, the first of which names the problem, and the message."""
    model, precision = config.model, config.precision
    weights, compute = precision.weights, precision.compute
    all_trained = model.train_unet and model.train_text_encoder_1 and model.train_text_encoder_2
    if compute == "fp32" and precision.frozen != "fp32" and not all_trained:
        yield (
            ("precision.frozen", "precision.compute"),
            "must be fp32 where precision.compute is: nothing casts between",
        )
    if weights == "autocast":
        if precision.gradients != "fp32":
            keys = ("precision.gradients", "precision.weights")
            yield keys, f"{precision.gradients} has no effect: with autocast weights and their gradients are fp32"
        return
    both = ("precision.weights", "precision.compute")
    if weights == "master" and compute == "fp32":
        yield both, "master has no effect where precision.compute is fp32; that may be bf16 or fp16"
    if weights == "stochastic" and compute != "bf16":
        yield both, f"stochastic needs precision.compute bf16, not {compute}"
    if precision.gradients == "bf16" and compute == "fp16":
        keys = ("precision.gradients", "precision.compute")
        yield keys, "must be fp32 where precision.compute is fp16: scaled gradients are added and unscaled in fp32"
    if compute not in ("fp32", precision.frozen) and not all_trained:
        keys_of_frozen = ("precision.frozen", "precision.compute", "precision.weights")
        message = f"must be {compute}, as precision.compute is: with precision.weights {weights} nothing casts between"
        yield keys_of_frozen, message
