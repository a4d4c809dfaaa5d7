#!/usr/bin/env bash
# What model.py needs in the policy environment (Python 3.11 or later): XPolicyLab itself, and our client.
# With FULL=1 also what runs a policy folder in the model server's own process: torch and everything above it.
set -euo pipefail
python -m pip install -e "$(cd "$(dirname "$0")/../.." && pwd)"
if [[ "${FULL:-0}" == 1 ]]; then
    python -m pip install "repwam-core[serve]"
else
    python -m pip install --no-deps repwam-core repvitok
    python -m pip install repwam-client lazy-loader msgspec pyyaml
fi
