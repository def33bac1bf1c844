"""Outcomes of runs that never were, with known effects: what a comparison's analysis and report are tested on."""

import math
from dataclasses import replace

import numpy as np

from bonetune.evaluation.result import TaskResult
from bonetune.evaluation.statistics import Proportion
from bonetune.experiments.findings import Question
from bonetune.experiments.outcome import Outcome, Scaled, Trial

RATES = (1e-3, 2e-3, 4e-3)
ENVIRONMENT = {"bonetune": "0.1.0", "torch": "2.13.0+cpu", "gpus": [], "cores": 2, "commit": "abc1234"}
STEPS = 48


def question(methods, references=("lora",), seeds=(1, 2, 3), **more):
    return Question("Methods", {name: f"{name}, r = 8" for name in methods}, references, seeds, 0, **more)


class Made:
    """Runs of methods with given effects.

    Args:
        effects: by method, how much lower its loss is than lora's, in nats; its share of right answers is higher by as much.
        seeds: of the runs that count.
        noise: scatter of a method's effect over seeds.
        items: of each test.
        tests: which there are, of loss, exact-match, rating.
        text: whether forgetting is measured.
        scales: of the learning-forgetting curve.
    """

    def __init__(
        self, effects, seeds=(1, 2, 3), *, noise=0.01, items=60, tests=("loss", "exact-match"), text=True, scales=(), seed=0
    ):
        self.effects, self.tests, self.text, self.scales, self.items = effects, tests, text, scales, items
        rng = np.random.default_rng(seed)
        self.sweeps = {
            name: {rate: self.swept(name, rate, 0.5 - effect + 0.05 * abs(math.log2(rate / 2e-3))) for rate in RATES}
            for name, effect in effects.items()
        }
        self.rates = dict.fromkeys(effects, 2e-3)
        difficulty = {seed: rng.normal(0, 1, size=items) for seed in seeds}
        self.counting = {
            name: {
                seed: self.run(name, seed, effect + rng.normal(0, noise), difficulty[seed], rng, float(number))
                for seed in seeds
            }
            for number, (name, effect) in enumerate(effects.items())
        }

    def swept(self, name, rate, validation):
        return Outcome(Trial(name, rate, 0), validation=validation, trainable_parameters=1000, r=8, environment=ENVIRONMENT)

    def run(self, name, seed, effect, difficulty, rng, number):
        results = {}
        tokens = 5 + np.arange(self.items) % 7
        losses = np.exp(0.3 * difficulty) * 0.5 - effect + rng.normal(0, 0.02, self.items)
        right = difficulty + rng.normal(0, 0.2, self.items) < 0.2 + 3 * effect
        if "loss" in self.tests:
            records = [
                {"row": i + 1, "loss": float(loss), "supervised_tokens": int(n)}
                for i, (loss, n) in enumerate(zip(losses, tokens, strict=True))
            ]
            score = sum(r["loss"] * r["supervised_tokens"] for r in records) / sum(r["supervised_tokens"] for r in records)
            protocol = "loss: mean cross-entropy of the expected answers, in nats a token"
            results["loss"] = TaskResult("loss", score, None, self.items, records, {}, protocol, higher_is_better=False)
        if "exact-match" in self.tests:
            records = [{"row": i + 1, "correct": bool(one), "output": "x"} for i, one in enumerate(right)]
            share = Proportion.of([r["correct"] for r in records])
            protocol = "exact-match: greedy, at most 128 new tokens"
            results["exact-match"] = TaskResult("exact-match", share.value, share.interval, self.items, records, {}, protocol)
        if "rating" in self.tests:
            results["rating"] = TaskResult("rating", 6.0 + effect, None, 2, [{"row": 1}, {"row": 2}], {}, "rating: a judge's")
        first = next(iter(results.values())).score if results else 0.0
        base, worst = 2.0, {"loss": 1.5}.get(next(iter(self.tests), ""), 0.0)
        rise = 0.03 + 0.02 * number + rng.normal(0, 0.003)
        return Outcome(
            Trial(name, 2e-3, seed),
            r=8,
            trainable_parameters=1000,
            init_seconds=0.2,
            train_seconds=48 * (0.4 + 0.05 * number),
            step_seconds=0.4 + 0.05 * number + 0.01 * seed,
            peak_memory_bytes=2**30 + int(number) * 2**26,
            saved_bytes=4000,
            results=results,
            base_text_loss=base if self.text else None,
            text_loss=base + rise if self.text else None,
            scaled=tuple(
                Scaled(
                    scale,
                    worst + (first - worst) * (1 - (1 - scale) ** 2),
                    base + rise * scale**2 if self.text else None,
                )
                for scale in self.scales
            ),
            environment=ENVIRONMENT,
            identity=f"{name}-{seed}",
        )

    def change(self, name, seed, **changes):
        """Have a run be otherwise."""
        self.counting[name][seed] = replace(self.counting[name][seed], **changes)
        return self

    def diverge(self, name, seed, why="The loss of step 7 is nan"):
        """Have a run that counts fall apart."""
        self.counting[name][seed] = Outcome(Trial(name, 2e-3, seed), failure=why, r=8, environment=ENVIRONMENT)
        return self

    @property
    def outcomes(self):
        return [outcome for runs in (*self.sweeps.values(), *self.counting.values()) for outcome in runs.values()]

    def curves(self):
        """What training logged of the runs that count."""
        return {
            name: {seed: curve(0.5 - self.effects[name], seed, outcome) for seed, outcome in runs.items()}
            for name, runs in self.counting.items()
        }


def curve(end, seed, outcome, steps=STEPS):
    rng = np.random.default_rng(seed)
    lines = []
    for step in range(1, steps + 1):
        loss = end * 0.5 + 3 * math.exp(-step / (6 + 10 * end)) + 0.05 * rng.normal() * math.exp(-step / 20)
        if outcome.failure is not None and step >= 7:
            break  # a loss that is not finite ends the training before it is logged
        pace = outcome.step_seconds or 0.4
        lines.append(
            {
                "step": step,
                "tokens": 800 * step + 10 * seed,
                "seconds": pace * step,
                "loss": loss,
                "grad_norm": 1 / step + 0.1 * abs(rng.normal()),
            }
        )
    return lines
