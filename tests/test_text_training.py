"""A masked language model distilled on text by the trainer, its teacher the same weights with the adapters off."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import language
import pytest
import torch

from di4c_ext import checkpoints, text
from di4c_ext.config import DistillConfig
from di4c_ext.models import draw_latents
from di4c_ext.models.masked_lm import Di4CForMaskedLM
from di4c_ext.process import AbsorbingProcess
from di4c_ext.trainer import DistillTrainer


def test_adapters_are_distilled_resumed_and_the_teacher_stays(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    (tmp_path / "lines.txt").write_text("\n\n".join(" ".join(language.WORDS[i:] * 2) for i in range(8)))
    folder = language.save("bert", tmp_path / "bert")
    blocks = text.load(
        str(tmp_path / "lines.txt"), length=12, tokenizer=language.tokenizer(), document_separator="\n\n"
    )

    def run(name: str, resume: str | None = None) -> DistillTrainer:
        torch.manual_seed(0)
        student = Di4CForMaskedLM.from_teacher(folder, latent_dim=3, latent_hidden_size=8, lora=True)
        settings = {"max_steps": 3, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.05}
        trainer = DistillTrainer(
            student,
            teacher=student.teacher_denoiser(),
            latents=partial(draw_latents, latent_dim=3),
            process=AbsorbingProcess(student.config.num_states, mask_id=student.config.mask_id),
            args=DistillConfig(
                output_dir=str(tmp_path / name),
                num_latents=2,
                ema_decay=0.9,
                use_cpu=True,
                disable_tqdm=True,
                **settings,
            ),
            train_dataset=blocks,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    resumed = run("resumed", str(tmp_path / "whole" / "checkpoint-2"))
    started = Di4CForMaskedLM.from_teacher(folder, latent_dim=3, lora=True).state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
        if "lora_" not in name and not whole.model.is_latent_name(name):
            assert torch.equal(value, started[name]), "only adapters and the latent's path are trained"
    moved = [name for name, value in whole.model.named_parameters() if "lora_B" in name and value.abs().max() > 0]
    assert moved and whole.model.latent_in.weight.abs().max() > 0
    checkpoints.save_model(whole.best_model(), tmp_path / "whole")
    loaded = Di4CForMaskedLM.from_pretrained(tmp_path / "whole", is_student=True)
    x = blocks.tokens[:2].long()
    wanted = Di4CForMaskedLM.as_teacher(folder)(x, None)
    assert torch.equal(loaded.teacher_denoiser()(x, None), wanted)
