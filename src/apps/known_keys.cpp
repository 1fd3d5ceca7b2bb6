#include "known_keys.hpp"

#include "selm/phases/generate.hpp"
#include "selm/phases/import.hpp"
#include "selm/phases/inspect.hpp"
#include "selm/phases/iterate.hpp"
#include "selm/phases/logprob.hpp"
#include "selm/phases/rank.hpp"
#include "selm/phases/train.hpp"

namespace selm::apps {

namespace {

template<typename Options>
void describe_default(OptionVisitor& visitor)
{
    Options options;
    options.describe(visitor);
}

} // namespace

KnownKeys all_known_keys()
{
    return collect_known_keys({describe_default<ImportOptions>, describe_default<GenerateOptions>, describe_default<RankOptions>,
                               describe_default<LogProbOptions>, describe_default<TrainOptions>, describe_default<IterateOptions>,
                               describe_default<InspectOptions>});
}

} // namespace selm::apps
