"""Stand-in for the generation tests, which the sdist lacks: what `generate` must do with every decoder."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed
from transformers.testing_utils import torch_device

NEW_TOKENS = 4
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}


class GenerationTesterMixin:
    """Mixed into a `unittest.TestCase` that has a `model_tester` and `all_model_classes`."""

    model_tester: Any
    all_model_classes: tuple[type[PreTrainedModel], ...]

    def test_generate_cache_equals_no_cache(self):
        for model, ids in self._generative_models():
            scores = {"output_scores": True, "return_dict_in_generate": True}
            cached = model.generate(ids, use_cache=True, **GREEDY, **scores)
            plain = model.generate(ids, use_cache=False, **GREEDY, **scores)
            _assert_close(torch.stack(cached.scores), torch.stack(plain.scores))
            assert torch.equal(cached.sequences, plain.sequences)

    def test_generate_left_padding_changes_nothing(self):
        for model, ids in self._generative_models():
            scores = {"output_scores": True, "return_dict_in_generate": True}
            padding = torch.zeros(ids.shape[0], 3, dtype=ids.dtype, device=ids.device)
            mask = torch.cat([torch.zeros_like(padding), torch.ones_like(ids)], dim=1)
            short = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, **scores)
            padded = model.generate(torch.cat([padding, ids], dim=1), attention_mask=mask, **GREEDY, **scores)
            _assert_close(torch.stack(short.scores), torch.stack(padded.scores))

    @torch.no_grad()
    def test_generate_prefill_in_two_pieces(self):
        for model, ids in self._generative_models():
            whole = model(ids, use_cache=True).logits[:, -1]
            first = model(ids[:, :-3], use_cache=True)
            second = model(ids[:, -3:], past_key_values=first.past_key_values, use_cache=True)
            _assert_close(whole, second.logits[:, -1])

    def test_generate_chunked_prefill(self):
        for model, ids in self._generative_models():
            whole = model.generate(ids, **GREEDY)
            chunked = model.generate(ids, prefill_chunk_size=3, **GREEDY)
            assert torch.equal(whole, chunked)

    def test_generate_static_cache(self):
        for model, ids in self._generative_models():
            dynamic = model.generate(ids, **GREEDY)
            static = model.generate(ids, cache_implementation="static", **GREEDY)
            assert torch.equal(dynamic, static)

    def test_generate_beams_and_samples(self):
        for model, ids in self._generative_models():
            length = ids.shape[1] + NEW_TOKENS
            beams = model.generate(ids, num_beams=2, num_return_sequences=2, **GREEDY)
            assert beams.shape == (2 * ids.shape[0], length)
            sample = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=True, top_k=5)
            assert sample.shape == (ids.shape[0], length)

    def test_generate_from_embeddings(self):
        for model, ids in self._generative_models():
            from_ids = model.generate(ids, **GREEDY)
            from_embeddings = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **GREEDY)
            assert torch.equal(from_ids[:, ids.shape[1] :], from_embeddings)

    @torch.no_grad()
    def test_generate_logits_to_keep(self):
        for model, ids in self._generative_models():
            every, last = model(ids).logits, model(ids, logits_to_keep=1).logits
            assert last.shape[1] == 1
            _assert_close(every[:, -1:], last)

    def test_generate_assisted_or_refused(self):
        """A stateless model drafts and checks as if greedy; a stateful one refuses, rather than be silently wrong."""
        for model, ids in self._generative_models():
            prompt = ids[:1]
            if model._is_stateful:
                try:
                    model.generate(prompt, assistant_model=model, **GREEDY)
                except ValueError:
                    continue
                raise AssertionError(f"{type(model).__name__} is stateful and did not refuse an assistant")
            greedy = model.generate(prompt, **GREEDY)
            assert torch.equal(greedy, model.generate(prompt, prompt_lookup_num_tokens=2, **GREEDY))
            assert torch.equal(greedy, model.generate(prompt, assistant_model=model, **GREEDY))

    def _generative_models(self) -> Iterator[tuple[Any, torch.Tensor]]:
        """Each class that can generate, as a model of seed 0, with two prompts free of padding."""
        for model_class in self.all_model_classes:
            if model_class.can_generate():
                set_seed(0)
                config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
                config = copy.deepcopy(config)
                config.use_cache = True
                model = model_class(config).to(torch_device).eval()
                model.generation_config.eos_token_id = None
                model.generation_config.pad_token_id = 0
                yield model, inputs["input_ids"][:2].clamp(min=1)


def _assert_close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
