"""The sides of the speed benchmark: Tunebook as users run it, and each peer in an environment of its own."""

from __future__ import annotations

from dataclasses import dataclass

from utils.machine import inspect_machine

OURS, OURS_ON_MLX = OUR_SIDES = ("tunebook", "tunebook_mlx")
SHORTEST = "short"
NOT_MEANT = "not a work of this side"


@dataclass(frozen=True)
class Side:
    """Who does the work.

    Attributes:
        script: in peers/, None for Tunebook.
        environment: folder in .bench/, and `requirements_<environment>.txt` in peers/; None for Tunebook's own.
        setting: what the job says to the script: plain, float32, tuned or liger.
        works: names of the works that it can do; empty for all.
        needs: `cuda` where it does not run without.
        insists_on_bfloat16: where that is not native each step takes minutes, so there it takes two of the shortest work.
        overrides: what Tunebook's recipe gets beside the work's own.
        prepares: whether the script has something to do once before its first run, which is not timed.
        says: how it is set, for the page.
    """

    name: str
    title: str
    script: str | None = None
    environment: str | None = None
    setting: str = "plain"
    works: tuple[str, ...] = ()
    needs: str | None = None
    insists_on_bfloat16: bool = False
    overrides: tuple[str, ...] = ()
    prepares: bool = False
    says: str = ""

    def find_obstacle(self, work: str) -> str | None:
        """Why it does not do a work here, in words; None if it does."""
        if self.needs == "cuda" and inspect_machine().device != "cuda":
            return "needs an NVIDIA GPU"
        if self.crawls_here() and work != SHORTEST:
            return f"bfloat16 is not native here and a step takes minutes; measured on {SHORTEST} alone"
        if self.setting == "float32" and inspect_machine().quick_bfloat16:
            return NOT_MEANT
        return NOT_MEANT if self.works and work not in self.works else None

    def crawls_here(self) -> bool:
        """Whether this machine would emulate what the side computes in."""
        return self.insists_on_bfloat16 and not inspect_machine().quick_bfloat16

    def limit_steps(self, steps: int) -> int:
        """Steps that it takes on this machine; at least two, because the first is not counted."""
        return min(steps, 2) if self.crawls_here() else steps


ADAPTER_WORKS = ("short", "medium", "long")
GPU_WORKS = (*ADAPTER_WORKS, "dpo", "full", "nf4", "gpu")
MLX_WORKS = ("small", "short", "medium")
SIDES = {
    side.name: side
    for side in (
        Side(
            OURS,
            "Tunebook",
            says="`scripts/train.py` with a recipe that names rows, batch, rate and rank, nothing else",
        ),
        Side(
            "trl",
            "TRL as it comes",
            "run_trl.py",
            "trl",
            insists_on_bfloat16=True,
            says="its trainers' own defaults: gradient checkpointing, bfloat16 autocast, one batch of all rows",
        ),
        Side(
            "trl_float32",
            "TRL in float32",
            "run_trl.py",
            "trl",
            setting="float32",
            says="as it comes, with `bf16=False`: what a user changes first where bfloat16 is not native",
        ),
        Side(
            "trl_tuned",
            "TRL tuned",
            "run_trl.py",
            "trl",
            setting="tuned",
            says="no checkpointing, no autocast, rows of like length in micro-batches (of 2 on a CPU), Tunebook's allocator "
            "settings; base and adapters in bfloat16 where that is native",
        ),
        Side(
            "llama_factory",
            "LLaMA-Factory",
            "run_llama_factory.py",
            "llama_factory",
            works=(*ADAPTER_WORKS, "full", "gpu"),
            prepares=True,
            says="its own defaults: gradient checkpointing, one batch of all rows, padding to a multiple of 8; model files "
            "copied in float32 beforehand where bfloat16 is not native, because it computes in their format",
        ),
        Side(
            "litgpt",
            "LitGPT",
            "run_litgpt.py",
            "litgpt",
            works=ADAPTER_WORKS,
            prepares=True,
            says="`finetune_lora` with one batch of all rows, float32 where bfloat16 is not native; model converted beforehand",
        ),
        Side(
            "mlx_lm",
            "mlx-lm",
            "run_mlx_lm.py",
            "mlx_lm",
            works=MLX_WORKS,
            says="adapters in all layers, no pad learned, float32 on a CPU; its mask knows one answer in a row, not several",
        ),
        Side(
            "mlx_lm_plain",
            "mlx-lm as it comes",
            "run_mlx_lm.py",
            "mlx_lm",
            setting="unchanged",
            works=MLX_WORKS,
            says="its own mask, which learns a pad in each padded row, and Adam without bias correction or clipping",
        ),
        Side(
            OURS_ON_MLX,
            "Tunebook on MLX",
            works=MLX_WORKS,
            overrides=("backend=mlx",),
            says="the same recipe with `backend: mlx`; on Linux with torch's matrix products",
        ),
        Side(
            "liger",
            "TRL tuned, with Liger",
            "run_trl.py",
            "trl_liger",
            setting="liger",
            works=GPU_WORKS,
            needs="cuda",
            says="as TRL tuned, with `use_liger_kernel`",
        ),
        Side(
            "unsloth",
            "Unsloth",
            "run_unsloth.py",
            "unsloth",
            setting="tuned",
            works=GPU_WORKS,
            needs="cuda",
            says="its `FastLanguageModel` under TRL's trainers, no checkpointing, all rows of a step at once",
        ),
    )
}
