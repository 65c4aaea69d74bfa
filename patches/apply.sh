#!/usr/bin/env bash
# Add --measure-critical-sharpness-every to a Megatron-LM checkout, or take it out again.
#
#   patches/apply.sh [--reverse] MEGATRON_LM_CHECKOUT
#
# The version is read from the checkout; one that there is no patch for is refused. The Python that
# runs Megatron needs this package: pip install . in this repository.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

die() {
    echo "apply.sh: $*" >&2
    exit 1
}

reverse=()
if [[ ${1:-} == --reverse ]]; then
    reverse=(--reverse)
    shift
fi
[[ $# == 1 ]] || die "usage: patches/apply.sh [--reverse] MEGATRON_LM_CHECKOUT"
[[ -d $1 ]] || die "$1: there is no such folder; name a Megatron-LM checkout"
checkout=$(cd "$1" && pwd)
info=$checkout/megatron/core/package_info.py
[[ -f $info ]] || die "$checkout is no Megatron-LM checkout: it has no megatron/core/package_info.py"

number() { sed -n "s/^$1 = \([0-9]*\).*/\1/p" "$info"; }
# Releases of one minor version take one patch; the tag core_v0.19.0 calls itself 0.19.1.
version=$(number MAJOR).$(number MINOR)
patch=$(ls "$here/core_v$version".*.patch 2>/dev/null || true)
if [[ ! -f $patch ]]; then
    known=$(cd "$here" && ls core_v*.patch | sed 's/\.patch$//' | tr '\n' ' ')
    die "$checkout is version $version, which there is no patch for (there are: ${known% }).
Run the unpatched script instead: python -m megatron_sharpness.megatron pretrain_gpt.py ..."
fi

name=$(basename "$patch")
# A folder above the checkout may be a repository too, which git must not take for the checkout.
apply() { (cd "$checkout" && GIT_CEILING_DIRECTORIES=$(dirname "$checkout") git apply "$@" "$patch"); }
fits() { apply --check "$@" 2>/dev/null; }

if fits "${reverse[@]}"; then
    apply "${reverse[@]}"
    if [[ ${#reverse[@]} == 0 ]]; then
        echo "applied $name to $checkout"
    else
        echo "took $name out of $checkout"
    fi
elif [[ ${#reverse[@]} == 0 ]] && fits --reverse; then
    echo "$name was applied to $checkout before; nothing to do"
elif [[ ${#reverse[@]} == 1 ]] && fits; then
    echo "$name is not in $checkout; nothing to do"
else
    die "$name does not fit $checkout: the end of its megatron/training/arguments.py was changed.
Add the lines of $patch there by hand, or run the unpatched script:
python -m megatron_sharpness.megatron pretrain_gpt.py ..."
fi
