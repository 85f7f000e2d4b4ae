"""Result rows and every view of them: tables, statistics, scores, sweeps, costs."""
