"""The classes that run without ``--whole``, and those whose folders are refused for now."""

from __future__ import annotations

SAMPLE = {
    "AltCLIPModel": "altclip/modeling_altclip",
    "BartForConditionalGeneration": "bart/modeling_bart",
    "BeitForImageClassification": "beit/modeling_beit",
    "BertForMaskedLM": "bert/modeling_bert",
    "ChineseCLIPModel": "chinese_clip/modeling_chinese_clip",
    "CLIPModel": "clip/modeling_clip",
    "ConvNextForImageClassification": "convnext/modeling_convnext",
    "DeepseekV3ForCausalLM": "deepseek_v3/modeling_deepseek_v3",
    "Gemma3ForConditionalGeneration": "gemma3/modeling_gemma3",
    "GPT2LMHeadModel": "gpt2/modeling_gpt2",
    "GptOssForCausalLM": "gpt_oss/modeling_gpt_oss",
    "JambaForCausalLM": "jamba/modeling_jamba",
    "LlamaForCausalLM": "llama/modeling_llama",
    "LlavaForConditionalGeneration": "llava/modeling_llava",
    "Mamba2ForCausalLM": "mamba2/modeling_mamba2",
    "MixtralForCausalLM": "mixtral/modeling_mixtral",
    "Phi3ForCausalLM": "phi3/modeling_phi3",
    "Qwen2VLForConditionalGeneration": "qwen2_vl/modeling_qwen2_vl",
    "Qwen3MoeForCausalLM": "qwen3_moe/modeling_qwen3_moe",
    "T5ForConditionalGeneration": "t5/modeling_t5",
    "ViTForImageClassification": "vit/modeling_vit",
    "Wav2Vec2Model": "wav2vec2/modeling_wav2vec2",
    "WhisperForConditionalGeneration": "whisper/modeling_whisper",
}
"""A class and its architecture."""
