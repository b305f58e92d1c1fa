#!/bin/bash
# What each node of the run executes, whoever starts it. Which node it is and where they meet is told by
# POLYCOM_NODE_RANK and POLYCOM_RENDEZVOUS; Slurm tells the rank by its own variable.
export POLYCOM_NODE_RANK="${POLYCOM_NODE_RANK:-${SLURM_NODEID:-0}}"
cd @DIRECTORY@ || exit
set -e # of the setup, where there is any
@SETUP@
exec @COMMAND@
