#!/usr/bin/env bash
# Known faults of the pinned packages, by pip-audit; says so and ends well where there is no pip-audit or nobody answers.
#   pip install pip-audit && bash scripts/audit_dependencies.sh
set -uo pipefail
cd "$(dirname "$0")/.."
if ! command -v pip-audit >/dev/null; then
    echo "pip-audit is not installed: nothing was audited (pip install pip-audit)."
    exit 0
fi
said=$(pip-audit --no-deps --disable-pip --timeout 15 --progress-spinner off -r requirements.txt 2>&1)
code=$?
echo "$said"
if [ $code -ne 0 ] && grep -qiE "ConnectionError|Connection|Timeout|Max retries|Name or service|resolve" <<<"$said" && ! grep -q "Found .* known vulnerabilit" <<<"$said"; then
    echo "The service that knows of faults could not be reached: nothing was audited."
    exit 0
fi
exit $code
