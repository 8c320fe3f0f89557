"""Which programs can run a model, as far as anyone knows."""

# what these programs' documentation or source lists under the type; none of them was run by us
OTHERS = {
    "mixtral": "vLLM, SGLang, llama.cpp",
    "qwen2_moe": "vLLM, SGLang, llama.cpp",
    "qwen3_moe": "vLLM, SGLang, llama.cpp",
    "olmoe": "vLLM, SGLang, llama.cpp",
    "flex_olmo": "vLLM",
    "deepseek_v3": "vLLM, SGLang, llama.cpp",
    "glm4_moe": "vLLM, SGLang, llama.cpp",
    "gpt_oss": "vLLM, SGLang, llama.cpp",
    "llama": "vLLM, SGLang, llama.cpp",
    "qwen3": "vLLM, SGLang, llama.cpp",
}


def serving(model_type: str, ours: bool) -> str:
    """A paragraph of the card."""
    if ours:
        return (
            "Transformers (`generate`, pipelines, `transformers serve`) where hf_moe is installed. vLLM, SGLang and "
            "llama.cpp do not know this architecture."
        )
    if model_type in OTHERS:
        return f"Transformers; by their documentation also {OTHERS[model_type]} (not tried with this model)."
    return "Transformers. Whether other programs know this type was not looked up."
