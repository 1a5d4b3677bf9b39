#!/bin/sh
# Sees to it that each site named has a valid token in /tokens, and leaves those alone that do. Tokens outlive a
# coordinator's state where only its volume is removed, hence the look at the list.
set -eu
umask 077
for site; do
    if [ -s "/tokens/$site.token" ] &&
        isthmus coordinator token list --state /state 2>/dev/null | grep -qx "$site	valid"; then
        continue
    fi
    isthmus coordinator token add "$site" --state /state >"/tokens/$site.token"
    echo "a new token for $site"
done
