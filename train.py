"""Train a classifier and tag it at the end of every epoch: python train.py data=cifar10 model=resnet32 [key=value ...]"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from freqprune import cli, config, runs


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    with runs.failures_kept(Path(cfg.output_dir)):
        config.validate(cfg)
        if runs.done_before(cfg):
            return
        # Lightning takes seconds to import: only once the configuration is known to be sound.
        from freqprune import workflow

        _, objects = workflow.train(cfg)
        if cfg.pruning.enabled:
            workflow.prune(cfg, dense=objects["classifier"].net, data=objects["data"])


if __name__ == "__main__":
    cli.run(main, Path(__file__).parent / "conf", "train")
