/* Messages to standard error. QEMU's own functions would bring its monitor along. */
#include <stdarg.h>
#include <stdio.h>

static void report(const char *prefix, const char *format, va_list arguments, const char *end)
{
    fputs(prefix, stderr);
    vfprintf(stderr, format, arguments);
    fputs(end, stderr);
}

#define REPORT(name, prefix, end) \
    void name(const char *format, ...) \
    { \
        va_list arguments; \
        va_start(arguments, format); \
        report(prefix, format, arguments, end); \
        va_end(arguments); \
    }

REPORT(error_printf, "", "")
REPORT(error_report, "error: ", "\n")
REPORT(warn_report, "warning: ", "\n")
