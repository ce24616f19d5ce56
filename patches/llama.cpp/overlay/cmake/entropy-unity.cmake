# SPDX-License-Identifier: MIT
#
# Several sources in one compilation for what all tools are linked with, as upstream has it for the models of libllama: the same headers are
# read, and the same templates compiled, once for each six files. Less than half of the time for these libraries, the same code.
# builder.py names this file in CMAKE_PROJECT_llama.cpp_INCLUDE, so it is read before there are any targets.

function(entropy_unity)
    foreach(target llama-common server-context mtmd)
        if(TARGET ${target})
            set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 6)
        endif()
    endforeach()
    # specialises templates that others use before; refuse to see internal headers
    foreach(alone llama-common:common/json.cpp mtmd:tools/mtmd/mtmd-helper.cpp mtmd:tools/mtmd/mtmd-helper-gen.cpp)
        string(REPLACE ":" ";" alone ${alone})
        list(GET alone 0 target)
        list(GET alone 1 source)
        if(TARGET ${target})
            set_source_files_properties(${PROJECT_SOURCE_DIR}/${source} TARGET_DIRECTORY ${target} PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
        endif()
    endforeach()
endfunction()

cmake_language(DEFER DIRECTORY ${CMAKE_SOURCE_DIR} CALL entropy_unity)
