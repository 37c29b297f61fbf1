"""What tests have to tell beside passing: lines that they record as the property "summary", printed at the end."""


def pytest_terminal_summary(terminalreporter):
    lines = [value for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())
             for name, value in getattr(report, "user_properties", ()) if name == "summary"]
    if lines:
        terminalreporter.section("summary")
        for line in lines:
            terminalreporter.write_line(line)
