"""`python -m lerobot_policy_repwam POLICY OUT`: a folder for LeRobot's --policy.path that names a policy folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from repvitok.runtime.errors import UserError
from repvitok.runtime.files import atomic_folder, refuse_foreign
from repwam_core.policy.folder import PolicyManifest

from .configuration_repwam import RepWAMConfig
from .processor_repwam import make_repwam_pre_post_processors

FILES = ("config.json", "policy_preprocessor.json", "policy_postprocessor.json")


def write_folder(policy: Path, out: Path) -> None:
    """Write LeRobot's config.json and processors for the policy folder `policy`, whose weights stay where they are."""
    manifest = PolicyManifest.load(policy)
    refuse_foreign(out, FILES, "folder for LeRobot")
    config = RepWAMConfig(policy_folder=str(policy.resolve()))
    config.describe(manifest)
    with atomic_folder(out, FILES) as fresh:
        for pipeline in make_repwam_pre_post_processors(config):
            pipeline.save_pretrained(fresh)
        config.device = None  # LeRobot takes the best that there is, or --policy.device
        config._save_pretrained(fresh)


def main() -> int:
    """Write the folder and say how it is used."""
    parser = argparse.ArgumentParser(prog="python -m lerobot_policy_repwam", description=__doc__)
    parser.add_argument("policy", type=Path, help="policy folder, from `repwam export`")
    parser.add_argument("out", type=Path, help="folder to write")
    options = parser.parse_args()
    try:
        write_folder(options.policy, options.out)
    except (UserError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"next: lerobot-eval --policy.path={options.out} --env.type=...")
    return 0


if __name__ == "__main__":
    sys.exit(main())
