import os; os.write(2, b"EVIL CODE of the working directory RUNS, uid %d\n" % os.getuid())
