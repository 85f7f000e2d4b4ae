"""Runs that are killed, interrupted and raced leave what an undisturbed run leaves.

PYTHONPATH=tests python -m campaign [kills] [races] [signals] [inputs] [--quick]
"""
