#!/usr/bin/env bash
# revision.sh CHECKOUT: print its commit without needing git; print nothing if it is not a git checkout.
# .git/HEAD holds the commit, or names the branch, whose commit is in a file or in a line of packed-refs.
set -euo pipefail
cd "$1/.git" 2>/dev/null || exit 0
head=$(<HEAD)
branch=${head#ref: }
if [[ $branch == "$head" ]]; then
  echo "$head"
elif [[ -e $branch ]]; then
  cat "$branch"
elif [[ -e packed-refs ]]; then
  sed -n "s|^\([0-9a-f]*\) $branch\$|\1|p" packed-refs
fi
