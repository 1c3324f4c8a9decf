#!/usr/bin/env bash
# Check the pinned packages for known vulnerabilities with pip-audit. Succeeds with a message if pip-audit or its service is missing.
#   pip install pip-audit && bash scripts/audit_dependencies.sh
set -uo pipefail
cd "$(dirname "$0")/.."
if ! command -v pip-audit >/dev/null; then
    echo "Nothing was audited: pip-audit is not installed (pip install pip-audit)."
    exit 0
fi
output=$(pip-audit --no-deps --disable-pip --timeout 15 --progress-spinner off -r requirements.txt 2>&1)
code=$?
echo "$output"
if [ $code -ne 0 ] && grep -qiE "ConnectionError|Connection|Timeout|Max retries|Name or service|resolve" <<<"$output" && ! grep -q "Found .* known vulnerabilit" <<<"$output"; then
    echo "Nothing was audited: the vulnerability service could not be reached."
    exit 0
fi
exit $code
