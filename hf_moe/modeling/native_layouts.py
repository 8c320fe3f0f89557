"""Where Transformers' own MoE families (5.23) keep the parts of their sparse layers: read from their code.

`tests/modeling/test_native_anatomy.py` runs every family that stands here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class NativeLayout:
    """One family.

    Args:
        block: class name of the sparse feed-forward.
        scoring: `softmax` over all experts, `softmax_selected` over the chosen ones, `sigmoid`, `score_fn` (a function
            that the gate has from its config) or `sparse_mixer`; None: the gate's `expert_selection_fn` says.
        normalize: whether the chosen weights are divided by their sum; None: the gate's `norm_topk_prob` says.
        shared: attribute of the block with the shared experts, which some configs switch off.
        bias: path from the block to the selection bias, which some configs switch off.
        gate: attribute of the block with the router.
        experts: attribute of the block with the experts; empty where the block holds their weights itself.
        num_experts: attribute of the experts that says how many have parameters.
        num_zero_experts: how many have none, behind the others, or the attribute of the experts that says so.
        least_top_k: the smallest number of experts per token that its code can run.
        most_top_k: the largest, if that is not all.
        top_k: where the number of experts per token is read from: path from the block.
        transposed: whether expert weights are stored (in, out); None: the experts' `is_transposed` says.
        needs: attribute of the block that is false where a layer is dense.
        whole_layer: whether the block is the whole decoder layer, attention included.
    """

    block: str
    scoring: str | None = "softmax"
    normalize: bool | None = None
    shared: str | None = None
    bias: str | None = None
    gate: str = "gate"
    experts: str = "experts"
    num_experts: str = "num_experts"
    num_zero_experts: str | int | None = None
    least_top_k: int = 1
    most_top_k: int | None = None
    top_k: str | None = None
    transposed: bool | None = None
    needs: str | None = None
    whole_layer: bool = False


def like_deepseek_v3(block: str, shared: str | None = "shared_experts") -> NativeLayout:
    """Sigmoid scores, a selection bias in the gate, shared experts."""
    return NativeLayout(block, "sigmoid", shared=shared, bias="gate.e_score_correction_bias")


def like_granite(block: str) -> NativeLayout:
    """Softmax over the chosen experts only."""
    return NativeLayout(block, "softmax_selected", True, gate="router")


NATIVE = {  # model type -> layout; the text models of composite types come under the composite's name
    "afmoe": NativeLayout("AfmoeSparseMoeBlock", "sigmoid", True, "shared_experts", "expert_bias", gate="router"),
    "aria": NativeLayout("AriaTextMoELayer", "softmax_selected", True, "shared_experts", gate="router"),
    "axk1": like_deepseek_v3("AXK1MoE"),
    "axk2": like_deepseek_v3("AXK2MoE"),
    "bailing_hybrid": like_deepseek_v3("BailingHybridMoE"),
    "beam": like_deepseek_v3("BeamMoE", shared=None),
    "cohere2_moe": NativeLayout("Cohere2MoeSparseMoeBlock", None, None, "shared_experts"),
    "dbrx": NativeLayout("DbrxFFN", "softmax", True, gate="router", top_k="top_k"),
    "deepseek_ocr2": NativeLayout("DeepseekOcr2TextMoe", "softmax", False, "shared_experts"),
    "deepseek_v2": NativeLayout("DeepseekV2Moe", "softmax", False, "shared_experts"),
    "deepseek_v3": like_deepseek_v3("DeepseekV3MoE"),
    "deepseek_v32": like_deepseek_v3("DeepseekV32MoE"),
    "deepseek_v4": NativeLayout(
        "DeepseekV4SparseMoeBlock", "score_fn", True, "shared_experts", "gate.e_score_correction_bias"
    ),
    "dots1": like_deepseek_v3("Dots1MoE"),
    "dots3_note": like_deepseek_v3("Dots3NoteTextMoE"),
    "ernie4_5_moe": NativeLayout(
        "Ernie4_5_MoeSparseMoeBlock", "softmax", True, "shared_experts", "gate.moe_statics.e_score_correction_bias"
    ),
    "ernie4_5_vl_moe": NativeLayout(  # one block for text, one for images
        "Ernie4_5_VLMoeSparseMoeBlock", "softmax", True, bias="gate.moe_statics.e_score_correction_bias"
    ),
    "exaone_moe": like_deepseek_v3("ExaoneMoeSparseMoEBlock"),
    "flex_olmo": NativeLayout("FlexOlmoSparseMoeBlock"),
    "flint": NativeLayout("FlintSparseMoeBlock", "sigmoid", None, "shared_expert"),
    "gemma4": NativeLayout(
        "Gemma4TextDecoderLayer",
        "softmax",
        True,
        "mlp",
        gate="router",
        top_k="router.config.top_k_experts",
        needs="enable_moe_block",
        whole_layer=True,
    ),
    "glm4_moe": like_deepseek_v3("Glm4MoeMoE"),
    "glm4_moe_lite": like_deepseek_v3("Glm4MoeLiteMoE"),
    "glm4v_moe": like_deepseek_v3("Glm4vMoeTextMoE"),
    "glm5_next": like_deepseek_v3("Glm5NextTextMoE"),
    "glm_moe_dsa": like_deepseek_v3("GlmMoeDsaMoE"),
    "gpt_oss": NativeLayout("GptOssMLP", "softmax_selected", True, gate="router"),
    "granitemoe": like_granite("GraniteMoeMoE"),
    "granitemoe_swa": like_granite("GraniteMoeSWAMoE"),
    "granitemoehybrid": like_granite("GraniteMoeHybridMoE"),
    "granitemoeshared": like_granite("GraniteMoeSharedMoE"),
    "hunyuan_v1_moe": NativeLayout("HunYuanMoEV1Moe", "softmax", True, "shared_mlp"),
    "hy_v3": NativeLayout("HYV3MoE", "sigmoid", True, "shared_experts", "e_score_correction_bias"),
    "hy_v4": like_deepseek_v3("HYV4MoE"),
    "inkling": NativeLayout("InklingMoE", "sigmoid", False, "shared_experts", "gate.e_score_correction_bias"),
    "inkling2": NativeLayout("Inkling2SparseMoeBlock", "score_fn", True, bias="gate.e_score_correction_bias"),
    "jamba": NativeLayout("JambaSparseMoeBlock", "softmax", False, gate="router"),
    "jetmoe": NativeLayout("JetMoeMoE", "softmax_selected", True, gate="router", experts=""),
    "kimi_linear": like_deepseek_v3("KimiLinearMoE"),
    "kolibri1": NativeLayout(
        "Kolibri1SparseMoeBlock", "sigmoid", None, "shared_experts", "gate.e_score_correction_bias"
    ),
    "laguna": NativeLayout("LagunaSparseMoeBlock", "sigmoid", True, "shared_experts", "gate.e_score_correction_bias"),
    "lfm2_moe": NativeLayout("Lfm2MoeSparseMoeBlock", "sigmoid", None, bias="expert_bias"),
    "llama4": NativeLayout("Llama4TextMoe", "sigmoid", False, "shared_expert", gate="router", transposed=True),
    "longcat_flash": NativeLayout(
        "LongcatFlashMoE",
        "softmax",
        False,
        bias="router.e_score_correction_bias",
        gate="router",
        num_experts="num_routed_experts",
        num_zero_experts="zero_expert_num",
        least_top_k=2,  # with 1, `squeeze(0)` in its experts takes the wrong dimension away (5.23)
    ),
    "mellum": NativeLayout("MellumSparseMoeBlock"),
    "mimo_v2_flash": like_deepseek_v3("MiMoV2FlashMoE", shared=None),
    "minimax": NativeLayout("MiniMaxSparseMoeBlock", "softmax", True),
    "minimax_m2": NativeLayout("MiniMaxM2SparseMoeBlock", "sigmoid", True, bias="e_score_correction_bias"),
    "minimax_m3_vl": NativeLayout(
        "MiniMaxM3VLSparseMoeBlock", "sigmoid", True, "shared_experts", "gate.e_score_correction_bias"
    ),
    "mistral4": NativeLayout("Mistral4MoE", "softmax", None, "shared_experts"),
    "mistral_large4": NativeLayout("MistralLarge4TextMoE", "softmax", True, "shared_experts"),
    "mixtral": NativeLayout("MixtralSparseMoeBlock", normalize=True),
    "muse_spark": NativeLayout("MuseSparkMoE", "sigmoid", True, bias="gate.e_score_correction_bias"),
    "nemotron_h": like_deepseek_v3("NemotronHMoE"),
    "olmoe": NativeLayout("OlmoeSparseMoeBlock"),
    "openai_privacy_filter": NativeLayout("OpenAIPrivacyFilterMLP", "softmax_selected", True, gate="router"),
    "phimoe": NativeLayout("PhimoeSparseMoeBlock", "sparse_mixer", False, gate="router", least_top_k=2, most_top_k=2),
    "qwen2_moe": NativeLayout("Qwen2MoeSparseMoeBlock", shared="shared_expert"),
    "qwen3_5_moe": NativeLayout("Qwen3_5MoeSparseMoeBlock", "softmax", True, "shared_expert"),
    "qwen3_moe": NativeLayout("Qwen3MoeSparseMoeBlock"),
    "qwen3_next": NativeLayout("Qwen3NextSparseMoeBlock", shared="shared_expert"),
    "qwen3_omni_moe": NativeLayout("Qwen3OmniMoeThinkerTextSparseMoeBlock"),
    "qwen3_vl_moe": NativeLayout("Qwen3VLMoeTextSparseMoeBlock", "softmax", True),
    "qwen4_exp": NativeLayout("Qwen4ExpTextSparseMoeBlock", shared="shared_expert"),
    "solar_open": like_deepseek_v3("SolarOpenMoE"),
    "step3p7": NativeLayout(
        "Step3p7SparseMoeBlock", "sigmoid", True, "shared_experts", "gate.e_score_correction_bias"
    ),
    "unlimited_ocr": NativeLayout("UnlimitedOcrTextMoe", "softmax", False, "shared_experts"),
    "zaya": NativeLayout(
        "ZayaSparseMoeBlock", "softmax", False, bias="gate.balancing_biases", num_zero_experts=1, most_top_k=1
    ),
}

SECOND_BLOCKS = (  # of composite types in the table above
    NativeLayout("Qwen3OmniMoeTalkerTextSparseMoeBlock", shared="shared_expert"),
    NativeLayout("Dots3NoteVisionMoE", "sigmoid", True, bias="e_score_correction_bias"),
)

UNSUPPORTED = {  # model type -> why `moe_layers` refuses it
    "diffusion_gemma": "it denoises with an encoder and a decoder",
    "doge": "it retrieves experts by product keys",
    "nllb_moe": "it is an encoder-decoder with capacity limits",
    "switch_transformers": "it is an encoder-decoder with capacity limits",
}


def table() -> str:
    """The families as a table in Markdown: `docs/anatomy.md`."""
    rows = ["| model type | block | router | scores | normalised | shared experts | selection bias |"]
    rows.append("| --- | --- | --- | --- | --- | --- | --- |")
    for name, layout in sorted(NATIVE.items()):
        normalized = {None: "`norm_topk_prob`", True: "yes", False: "no"}[layout.normalize]
        scoring = layout.scoring or "`expert_selection_fn`"
        cells = [f"`{name}`", f"`{layout.block}`", f"`{layout.gate}`", scoring, normalized]
        cells += [f"`{path}`" if path else "" for path in (layout.shared, layout.bias)]
        rows.append("| " + " | ".join(cells) + " |")
    rows += ["", "| not supported | for |", "| --- | --- |"]
    rows += [f"| `{name}` | {reason} |" for name, reason in sorted(UNSUPPORTED.items())]
    return "\n".join(rows) + "\n"
