"""Tag a trained network, remove the filters its tags call unimportant, fine-tune: python prune.py ckpt=FILE [key=value ...]"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from freqprune import cli, config, runs


@hydra.main(version_base="1.3", config_path="conf", config_name="prune")
def main(cfg: DictConfig) -> None:
    with runs.failures_kept(Path(cfg.output_dir)):
        config.validate(cfg)
        if runs.done_before(cfg):
            return
        # Lightning takes seconds to import: only once the configuration is known to be sound.
        from freqprune import workflow

        if cfg.ckpt is not None or cfg.pretrained:
            workflow.prune(cfg)
        else:
            _, objects = workflow.train(cfg)
            workflow.prune(cfg, dense=objects["classifier"].net, data=objects["data"])


if __name__ == "__main__":
    cli.run(main, Path(__file__).parent / "conf", "prune")
