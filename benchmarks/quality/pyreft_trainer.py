"""pyreft's own trainer, in a process of the environment that has its pins.

Tokens come from this side, so that they are the same for every method. The other side
is ``python -m benchmarks.quality.pyreft_trainer``; it needs nothing of this package.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import torch

from benchmarks.quality.clock import Clock
from benchmarks.worker import Worker, serve

# Ids of a prompt and of its answer.
Row = tuple[Sequence[int], Sequence[int]]


class PyreftModel(Worker):
    """A model in a process of pyreft's environment.

    Args:
        python: interpreter of the environment.
    """

    def __init__(self, python: str) -> None:
        super().__init__("benchmarks.quality.pyreft_trainer", python)

    def train(self, model: Path, rows: Sequence[Row], **settings: Any) -> Any:
        """Train LoReFT on a model, and return what of ``Trained`` is not the model."""
        return self.ask({"train": {"model": str(model), "rows": rows, **settings}})

    def generate(self, prompts: Sequence[list[int]], most: int) -> list[list[int]]:
        """Return the ids that greedy decoding adds to each prompt."""
        return self.ask({"generate": {"prompts": prompts, "most": most}})

    def unload(self) -> None:
        """End the process."""
        self.close()


class _Subject:
    """What the process trains and asks."""

    def handle(self, request: dict[str, Any]) -> Any:
        if "train" in request:
            return self._train(**request["train"])
        return self._generate(**request["generate"])

    def _train(
        self,
        model: str,
        rows: list[Row],
        positions: str,
        rank: int,
        learning_rate: float,
        seed: int,
        steps: int,
        batch: int,
    ) -> dict[str, Any]:
        from pyreft import ReftDataCollator, ReftTrainerForCausalLM
        from transformers import DataCollatorForSeq2Seq, TrainingArguments

        torch.manual_seed(seed)
        self._load(model, positions, rank)
        clock = Clock()
        with TemporaryDirectory() as directory:
            arguments = TrainingArguments(
                directory,
                learning_rate=learning_rate,
                lr_scheduler_type="cosine",
                max_steps=steps,
                per_device_train_batch_size=batch,
                seed=seed,
                use_cpu=not torch.cuda.is_available(),
                save_strategy="no",
                report_to=[],
                logging_steps=1,
                disable_tqdm=True,
                remove_unused_columns=False,
            )
            trainer = ReftTrainerForCausalLM(
                self._model,
                arguments,
                train_dataset=self._dataset(rows),
                data_collator=ReftDataCollator(DataCollatorForSeq2Seq(self._tokenizer)),
                callbacks=[clock],
            )
            start = process_time()
            trainer.train()
        seconds = process_time() - start
        history = trainer.state.log_history
        trained = (p for p in self._model.parameters() if p.requires_grad)
        return {
            "cpu_seconds": seconds,
            "losses": [log["loss"] for log in history if "loss" in log],
            "step_seconds": clock.seconds,
            "parameters": sum(p.numel() for p in trained),
        }

    def _load(self, path: str, positions: str, rank: int) -> None:
        from pyreft import LoreftIntervention, ReftConfig, get_reft_model
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            PreTrainedTokenizerFast,
        )

        config = AutoConfig.from_pretrained(path)
        # transformers 5's name, without which 4.45 would take 10,000.
        config.rope_theta = config.rope_parameters["rope_theta"]
        base = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            torch_dtype=torch.bfloat16,
            attn_implementation="eager",
        )
        representations = [
            {
                "layer": layer,
                "component": "block_output",
                "low_rank_dimension": rank,
                "intervention": LoreftIntervention(
                    embed_dim=config.hidden_size, low_rank_dimension=rank
                ),
            }
            for layer in range(config.num_hidden_layers)
        ]
        reft_config = ReftConfig(representations=representations)
        self._model: Any = get_reft_model(base, reft_config)
        self._positions, self._layers = positions, len(representations)
        # To pad with the end of a turn, as the model's own tokenizer does, would hide
        # the ends of turns: pyreft attends to no token of the padding's id.
        self._tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=f"{path}/tokenizer.json", pad_token="<|endoftext|>"
        )

    def _dataset(self, rows: Sequence[Row]) -> Any:
        """As the paper's dataset, which pyreft's package lacks."""
        from pyreft import ReftDataset

        class Rows(ReftDataset):
            def tokenize(self, item: Row) -> tuple[dict[str, torch.Tensor], int]:
                prompt, answer = map(list, item)
                ids = torch.tensor(prompt + answer)
                labels = torch.tensor([-100] * len(prompt) + answer)
                return {"input_ids": ids, "labels": labels}, len(prompt)

        return Rows(
            "",
            None,
            self._tokenizer,
            dataset=rows,
            position=self._positions,
            num_interventions=self._layers,
            share_weights=True,
        )

    def _generate(self, prompts: list[list[int]], most: int) -> list[list[int]]:
        rows = list(self._dataset([(prompt, []) for prompt in prompts]))
        self._tokenizer.padding_side = "left"
        names = "input_ids", "attention_mask"
        inputs = self._tokenizer.pad(
            {name: [row[name] for row in rows] for name in names}, return_tensors="pt"
        ).to(self._model.get_device())
        length = inputs["input_ids"].shape[1]
        locations = list[list[int]]()
        for row in rows:
            padding = length - len(row["input_ids"])
            tokens = row["intervention_locations"][0]
            locations.append([padding + token for token in tokens])
        self._model.eval()
        # See head_by_copy of examples.real.answers.
        self._model.model.get_output_embeddings().weight.requires_grad_(True)
        _, ids_BT = self._model.generate(
            inputs,
            unit_locations={"sources->base": (None, [locations] * self._layers)},
            intervene_on_prompt=True,
            do_sample=False,
            max_new_tokens=most,
        )
        return ids_BT[:, length:].tolist()


if __name__ == "__main__":
    serve(_Subject().handle)
