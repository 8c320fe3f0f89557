"""GRPO on a tiny Qwen3-MoE whose policy pass uses the experts that the rollout used (rollout routing replay).

Runs on a CPU without a download: `python examples/grpo_with_replay.py`. Rollouts are made by Transformers' `generate`.
The method: https://arxiv.org/abs/2510.11370.
"""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM, set_seed
from trl import GRPOConfig, GRPOTrainer

from hf_moe.training import RoutingReplay

WORDS = ["<pad>", "<s>", "</s>", *(chr(ord("a") + i) for i in range(26))]
WANTED = WORDS.index("e")


class ReplayingTrainer(GRPOTrainer):
    """GRPO that keeps the routing of a rollout beside its tokens, and replays it where the loss is computed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations):
            raise ValueError(
                "This example replays on-policy losses only: old log-probabilities would need it as well."
            )
        if self.use_vllm or self.args.gradient_checkpointing:
            raise ValueError("This example needs use_vllm=False and gradient_checkpointing=False.")
        self.replay = RoutingReplay(self.model)
        self.agreement: list[float] = []  # share of real tokens' experts in the policy pass that the rollout used too

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        with self.replay.record() as recording:
            output = super()._generate_and_score_completions(inputs)
        length = output["prompt_ids"].shape[1] + output["completion_ids"].shape[1]
        if recording.routed_experts.shape[1] != length - 1:  # the last token was drawn but never run
            raise ValueError(f"{recording.routed_experts.shape[1]} routed tokens for rollouts of {length}.")
        output["routed_experts"] = recording.routed_experts  # TRL shuffles and splits it with the other tensors
        return output

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        routed = inputs["routed_experts"]
        with self.replay.replay(routed), self.replay.record() as recording:
            loss = super()._compute_loss(model, inputs)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)[:, : routed.shape[1]].bool()
        same = recording.routed_experts[:, : routed.shape[1]] == routed
        self.agreement.append(same[mask].float().mean().item())
        return loss


def share_of_wanted(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """The reward: how much of an answer is the letter e."""
    return [sum(token == WANTED for token in ids) / max(len(ids), 1) for ids in completion_ids]


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def make_model() -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, moe_intermediate_size=32, head_dim=8,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=8, num_experts_per_tok=2,
            max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def main(steps: int = 20) -> ReplayingTrainer:
    """Train, and say what came of it."""
    set_seed(0)
    prompts = Dataset.from_dict({"prompt": ["a b c", "d f", "x y z w", "h"] * 40})
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=16, num_generations=8, learning_rate=1e-2,
            max_completion_length=8, beta=0.0, gradient_checkpointing=False, bf16=False, use_cpu=True,
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
            router_aux_loss_coef=0.0,
        )  # fmt: skip
        trainer = ReplayingTrainer(
            model=make_model(), reward_funcs=share_of_wanted, args=settings, train_dataset=prompts,
            processing_class=make_tokenizer(),
        )  # fmt: skip
        trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(
        f"reward {rewards[0]:.3f} -> {rewards[-1]:.3f}; experts shared with the rollout: {min(trainer.agreement):.1%}"
    )
    return trainer


if __name__ == "__main__":
    main()
