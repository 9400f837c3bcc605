#!/bin/sh
# The same experiment as scripts/ba-lora.sh, by another method; its header explains the settings.
METHOD=lora exec sh "$(dirname "$0")/ba-lora.sh" "$@"
