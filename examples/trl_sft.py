"""Finetune LoRA adapters with TRL's ``SFTTrainer``: the base is recorded, and read from its folder once it is sharded.

python examples/trl_sft.py --demo                              # one device, a tiny model that it makes by itself
accelerate launch --use_fsdp --fsdp_version=2 --fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP \\
    examples/trl_sft.py --checkpoint Llama-3.2-1B/             # each GPU reads its own part

Needs trl, peft and transformers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from fabric_init import FillModel, deferred_init, init_report

WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "lay", "by", "the", "door"]


def write_demo(folder: Path) -> None:
    """Write a tiny model and its tokenizer."""
    words = {word: number for number, word in enumerate(["<pad>", "<unk>", "<eos>", *sorted(set(WORDS))])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    ).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(words), pad_token_id=0, eos_token_id=2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("tiny-llama"), help="a folder in Hugging Face layout")
    parser.add_argument("--demo", action="store_true", help="write a tiny checkpoint there first")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    if options.demo:
        write_demo(options.checkpoint)

    with deferred_init():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.checkpoint))
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir="finetuned",
            max_steps=options.steps,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            bf16=torch.cuda.is_available(),
            report_to=[],
            logging_steps=1,
        ),
        train_dataset=Dataset.from_list([{"text": " ".join(WORDS[start:])} for start in range(8)]),
        processing_class=AutoTokenizer.from_pretrained(options.checkpoint),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    FillModel(options.checkpoint).attach(trainer)
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(init_report(trainer.model))


if __name__ == "__main__":
    main()
